import json
import os
from pathlib import Path
from typing import Any

import pytest

from novajax.core.errors import ConfigError
from novajax.weights.tokens import read_generation

SHARED = Path(os.environ.get("NOVAJAX_SHARED", str(Path(__file__).parents[2].parent / "shared")))
GEMMA_LIKE = {"id": 8, "content": "<image_soft_token>"}


def write(directory: Path, **files: Any) -> Path:
    for name, value in files.items():
        (directory / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return directory


def tokenizer(size: int = 8, *added: dict[str, Any]) -> dict[str, Any]:
    return {"model": {"type": "BPE", "vocab": {f"w{i}": i for i in range(size)}, "merges": []}, "added_tokens": list(added)}


def test_defaults_are_what_the_file_says(tmp_path: Path):
    generation = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True, "eos_token_id": [5, 3]}
    write(tmp_path, generation_config=generation)
    read = read_generation(tmp_path, {"eos_token_id": 1}, 8)
    assert read.default_sampling == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    assert read.end_token_ids == (5, 3), "generation_config.json wins over config.json"


def test_nothing_there_is_fine(tmp_path: Path):
    read = read_generation(tmp_path, {}, 8)
    assert (read.default_sampling, read.end_token_ids) == ({}, ())


@pytest.mark.parametrize(
    ("generation", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"eos_token_id": 8}, "eos_token_id"),
        ({"eos_token_id": [1, "</s>"]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
    ],
)
def test_a_default_out_of_bounds_is_refused_by_its_key(tmp_path: Path, generation: dict, param: str):
    write(tmp_path, generation_config=generation)
    with pytest.raises(ConfigError, match=r"generation_config\.json") as refused:
        read_generation(tmp_path, {}, 8)
    assert refused.value.param == param


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
@pytest.mark.parametrize("name", ["generation_config", "tokenizer_config", "tokenizer"])
def test_a_file_that_is_no_object_is_named(tmp_path: Path, name: str, text: str):
    write(tmp_path, **{name: text})
    with pytest.raises(ConfigError, match=f"{name}.json"):
        read_generation(tmp_path, {}, 8)


def test_minus_one_means_none(tmp_path: Path):
    write(tmp_path, generation_config={"eos_token_id": -1, "top_k": -1})
    assert read_generation(tmp_path, {}, 8).end_token_ids == ()
    assert read_generation(tmp_path, {}, 8).default_sampling == {}


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_the_tokenizers_own_end_joins(tmp_path: Path, eos: Any):
    write(tmp_path, tokenizer=tokenizer(7, {"id": 7, "content": "</s>"}), tokenizer_config={"eos_token": eos})
    assert read_generation(tmp_path, {"eos_token_id": 2}, 8).end_token_ids == (2, 7)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path):
    write(tmp_path, tokenizer=tokenizer(9))
    with pytest.raises(ConfigError, match="vocab_size=8 is smaller than the tokenizer's 9") as refused:
        read_generation(tmp_path, {}, 8)
    assert refused.value.param == "vocab_size"
    read_generation(tmp_path, {}, 9)
    unigram = {"model": {"type": "Unigram", "vocab": [["a", -1.0]] * 9}}
    with pytest.raises(ConfigError, match="vocab_size=8"):
        read_generation(write(tmp_path, tokenizer=unigram), {}, 8)


def test_an_added_token_beyond_it_passes_only_when_nothing_would_write_it(tmp_path: Path):
    write(tmp_path, tokenizer=tokenizer(8, GEMMA_LIKE))
    read_generation(tmp_path, {}, 8)
    for config in ({"eos_token": GEMMA_LIKE["content"]}, {"bos_token": GEMMA_LIKE["content"]}, {"chat_template": "x<image_soft_token>y"}):
        with pytest.raises(ConfigError, match="has no room for '<image_soft_token>' = 8"):
            read_generation(write(tmp_path, tokenizer_config=config), {}, 8)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("x<image_soft_token>y")
    with pytest.raises(ConfigError, match="has no room"):
        read_generation(tmp_path, {}, 8)


def test_a_real_tokenizer():
    directory = SHARED / "tokenizers" / "qwen2.5"
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there")
    assert read_generation(directory, {"eos_token_id": 151643}, 151936).end_token_ids == (151643, 151645)
    with pytest.raises(ConfigError, match="vocab_size=151650 has no room for"):
        read_generation(directory, {}, 151650)
    with pytest.raises(ConfigError, match="vocab_size=151000 is smaller"):
        read_generation(directory, {}, 151000)
