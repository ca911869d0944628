import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from novajax.text.detokenizer import Detokenizer
from novajax.text.tokenizer import Tokenizer

TEXTS = [
    "Once upon a time",
    "  two leading spaces, and trailing  ",
    "naïve café, Straße, e\u0301 combining",
    "日本語のテキスト、한국어, العربية, हिन्दी",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 thumbs",
    "tabs\tand\nlines\r\n\r\nand\u2028more\u0000nul",
    "<|im_start|>not a control token<|im_end|> <s></s>",
]


def stream(tokenizer: Tokenizer, ids: Sequence[int], skip_special: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.fixture(params=["byte_tokenizer", "stories", "qwen"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_never_half_a_character(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizers.normalizers.NFC().normalize_str(text) or "e\u0301" in text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back(byte_tokenizer: Tokenizer, text: str):
    ids = byte_tokenizer.encode(text)
    assert "".join(stream(byte_tokenizer, ids)) == byte_tokenizer.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 600), max_size=40), st.booleans())
def test_any_ids_stream_as_they_decode(byte_tokenizer: Tokenizer, ids: list[int], skip_special: bool):
    pieces = stream(byte_tokenizer, ids, skip_special)
    assert "".join(pieces) == byte_tokenizer.decode(ids, skip_special=skip_special)


def test_random_ids_of_real_tokenizers(tokenizer: Tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(tokenizer.size + 10) for _ in range(draw.randrange(30))]
        for skip_special in (True, False):
            assert "".join(stream(tokenizer, ids, skip_special)) == tokenizer.decode(ids, skip_special=skip_special)


@pytest.mark.parametrize("name", ["stories", "qwen"])
def test_decoding_agrees_with_the_library(request: pytest.FixtureRequest, name: str):
    """Always for byte-level BPE; for byte fallback wherever the bytes are characters (the library spoils their neighbours)."""
    ours, library = request.getfixturevalue(name), request.getfixturevalue(f"{name}_library")
    draw, compared = random.Random(1), 0
    samples = [[token] for token in range(0, ours.size, 1 if ours.size < 1000 else 101)]
    samples += [[draw.randrange(ours.size) for _ in range(3)] for _ in range(2000)]
    for ids in samples:
        theirs = library.decode(ids, skip_special_tokens=True)
        if name == "stories" and "\ufffd" in theirs:
            continue
        compared += 1
        assert ours.decode(ids) == theirs
    assert compared > 1000


def test_naughty_strings(qwen: Tokenizer, qwen_library: tokenizers.Tokenizer, shared: Path):
    strings = json.loads((shared / "data/text/blns.json").read_text())
    for text, ids in zip(strings, qwen.encode_batch(strings), strict=True):
        decoded = qwen.decode(ids)
        assert "".join(stream(qwen, ids)) == decoded == tokenizers.normalizers.NFC().normalize_str(text)
        assert ids == qwen_library.encode(text).ids


def test_a_broken_end_becomes_one_replacement_character(byte_tokenizer: Tokenizer):
    ids = byte_tokenizer.encode("a👍")[:-1]
    assert stream(byte_tokenizer, ids) == ["a", "", "", "", "\ufffd"]


def test_the_leading_space_of_sentencepiece(stories: Tokenizer):
    prompt = stories.encode("Once upon")
    there = stories.encode("there", add_special=False)
    assert stories.token_bytes(there[0]).startswith(b" ")
    first = Detokenizer(stories, [stories.bos_id or 1])
    assert "".join(map(first.push, there)) == "there"
    after = Detokenizer(stories, prompt)
    assert "".join(map(after.push, there)) == " there"


def test_a_prompt_may_end_inside_a_character(byte_tokenizer: Tokenizer):
    ids = byte_tokenizer.encode("né!")
    detokenizer = Detokenizer(byte_tokenizer, ids[:2])
    assert [detokenizer.push(token) for token in ids[2:]] == ["é", "!"]
