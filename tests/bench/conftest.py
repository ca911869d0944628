import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the benchmarks are no part of the installed package


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from novajax.text.fake import write_byte_tokenizer
    from novajax.text.tokenizer import Tokenizer

    return Tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))
