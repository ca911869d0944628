"""Tokenizers for the tests: one made of nothing, and the real ones where the optional shared data is present."""

import os
from pathlib import Path

import pytest
import tokenizers

from novajax.text.fake import write_byte_tokenizer
from novajax.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def shared() -> Path:
    path = Path(os.environ.get("NOVAJAX_SHARED", Path(__file__).parents[3] / "shared"))
    if not path.is_dir():
        pytest.skip(f"the optional shared data is not at {path} (set NOVAJAX_SHARED)")
    return path


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="session")
def stories(shared: Path) -> Tokenizer:
    """sentencepiece-style BPE with byte fallback, 512 ids."""
    return Tokenizer(shared / "models/stories260k")


@pytest.fixture(scope="session")
def qwen(shared: Path) -> Tokenizer:
    """Byte-level BPE, 151,665 ids."""
    return Tokenizer(shared / "tokenizers/qwen2.5")


@pytest.fixture(scope="session")
def stories_library(shared: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(shared / "models/stories260k/tokenizer.json"))


@pytest.fixture(scope="session")
def qwen_library(shared: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(shared / "tokenizers/qwen2.5/tokenizer.json"))
