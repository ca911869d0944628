import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from novajax.core.errors import ConfigError, InvalidRequest
from novajax.text.fake import write_byte_tokenizer
from novajax.text.tokenizer import Tokenizer, check_bytes, check_vocabulary


def edited(directory: Path, file: str, **changes: Any) -> Path:
    """The byte tokenizer's directory with top-level entries of one file replaced (None: removed)."""
    write_byte_tokenizer(directory)
    path = directory / file
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    return directory


def added(token_id: int, content: str, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **plain, **flags}


def test_golden_prompts(stories: Tokenizer, shared: Path):
    goldens = json.loads((shared / "models/goldens.json").read_text())
    for case in goldens["stories260K"]["greedy"]:
        assert stories.encode(case["prompt"]) == case["prompt_ids"]
        assert stories.decode(case["prompt_ids"] + case["output_ids"]) == case["text"]


@pytest.mark.parametrize("name", ["stories", "qwen"])
def test_same_ids_as_the_library(request: pytest.FixtureRequest, shared: Path, name: str):
    ours, library = request.getfixturevalue(name), request.getfixturevalue(f"{name}_library")
    text = (shared / "data/text/tinystories_sample.txt").read_text() + "日本語 naïve\n\n\n  👍 123456"
    plain = text.replace("<|endoftext|>", "")
    assert ours.encode(plain) == library.encode(plain).ids
    assert ours.encode(plain, add_special=False) == library.encode(plain, add_special_tokens=False).ids
    controlled = "<|im_start|>user\nhi <s>there</s><|im_end|>" + plain
    assert ours.encode(controlled, parse_special=True, add_special=False) == library.encode(controlled, add_special_tokens=False).ids


def test_control_tokens_come_only_where_asked_for(qwen: Tokenizer, stories: Tokenizer):
    for tokenizer in (qwen, stories):
        for text, token in tokenizer.control_tokens.items():
            plain = tokenizer.encode(f"a {text} b", add_special=False)
            assert token not in plain
            assert tokenizer.decode(plain) == f"a {text} b"
            assert token in tokenizer.encode(f"a {text} b", add_special=False, parse_special=True)


def test_the_guard_keeps_text_text_and_disappears(qwen: Tokenizer):
    text = "<|im_start|>user\n<\U000f0000|im_start|>x"
    start = qwen.control_tokens["<|im_start|>"]
    ids = qwen.encode(text, parse_special=True, guard="\U000f0000")
    assert ids.count(start) == 1
    assert ids[0] == start
    assert qwen.decode(ids, skip_special=False) == "<|im_start|>user\n<|im_start|>x"


def test_begin_tokens_are_never_doubled(stories: Tokenizer):
    assert stories.encode("Once") == [1, *stories.encode("Once", add_special=False)]
    assert stories.encode("<s>Once", parse_special=True)[:2] == stories.encode("Once")[:2]


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, True), (True, False), (False, True), (False, False), (None, None)])
def test_the_configuration_decides_about_begin_and_end_tokens(tmp_path: Path, add_bos: bool | None, add_eos: bool | None):
    changes = {"bos_token": {"content": "<|endoftext|>"}, "add_bos_token": add_bos, "add_eos_token": add_eos}
    tokenizer = Tokenizer(edited(tmp_path, "tokenizer_config.json", **changes))
    ids = tokenizer.encode("a")
    assert ids[:1] == ([256] if add_bos else tokenizer.encode("a", add_special=False))
    assert (ids[-1] == 258) is bool(add_eos)


def test_special_tokens_from_the_older_map_file(tmp_path: Path):
    edited(tmp_path, "tokenizer_config.json", eos_token=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    assert Tokenizer(tmp_path).eos_id == 256


def test_added_tokens_that_only_the_configuration_names(tmp_path: Path):
    extra = {"259": {k: v for k, v in added(259, "<|extra|>").items() if k != "id"}}
    tokenizer = Tokenizer(edited(tmp_path, "tokenizer_config.json", added_tokens_decoder=extra))
    assert tokenizer.encode("<|extra|>", parse_special=True) == [259]
    assert (tokenizer.size, tokenizer.decode([259], skip_special=False)) == (260, "<|extra|>")


def test_tokens_keep_their_ids_and_flags(tmp_path: Path):
    """Control tokens inside the vocabulary, one that strips, and an ordinary added token after them."""
    write_byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"] |= {"<begin>": 256, "<end>": 257}
    tokens = [added(256, "<begin>"), added(257, "<end>", rstrip=True), added(258, "<|im_end|>"), added(259, "<think>", special=False)]
    document["added_tokens"] = tokens
    path.write_text(json.dumps(document))
    ours, library = Tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(path))
    text = "<begin>a<end>  \n b<think>c<|im_end|>"
    assert ours.encode(text, parse_special=True) == library.encode(text).ids
    plain = ours.encode(text)
    assert 259 in plain
    assert not {256, 257, 258} & set(plain)
    assert ours.decode(plain) == text


def test_added_tokens_stand_for_their_own_text(tmp_path: Path):
    """In the byte-level alphabet an accented letter is a byte; in an added token it is itself."""
    write_byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    document["added_tokens"].append(added(259, "é ü", special=False))
    path.write_text(json.dumps(document))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("é ü") == [259]
    assert tokenizer.decode([259]) == "é ü"


def test_a_unigram_vocabulary_does_not_leak_control_tokens(tmp_path: Path):
    """Unigram models find any text of their vocabulary, control tokens too; and Metaspace drops the first space."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "<s>/abc"), ("▁ab", -1.0)]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()  # type: ignore[assignment]
    library.decoder = tokenizers.decoders.Metaspace()  # type: ignore[assignment]
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("<s>ab</s>", parse_special=True) == library.encode("<s>ab</s>").ids
    ids = tokenizer.encode("<s>ab</s>")
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "<s>ab</s>"
    assert tokenizer.decode(tokenizer.encode("ab ab")) == library.decode(library.encode("ab ab").ids) == "ab ab"


def test_delimiters_are_control_tokens_even_where_not_marked_special(tmp_path: Path):
    write_byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    document["added_tokens"].append(added(259, "<｜User｜>", special=False))
    path.write_text(json.dumps(document, ensure_ascii=False))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("<｜User｜>", parse_special=True) == [259]
    assert 259 not in tokenizer.encode("<｜User｜>")
    assert tokenizer.decode([259]) == "<｜User｜>"


@pytest.mark.parametrize("name", ["byte_tokenizer", "stories", "qwen"])
def test_the_bytes_of_tokens_add_up_to_the_text(request: pytest.FixtureRequest, name: str):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = "Hello 日本語 👍 naïve"
    ids = tokenizer.encode(text, add_special=False)
    data = b"".join(map(tokenizer.token_bytes, ids))
    assert data.decode().removeprefix(" ") == text
    assert [tokenizer.token_bytes(token) for token in (-1, tokenizer.size, 10**9)] == [b""] * 3


def test_async_forms_and_batches_agree(qwen: Tokenizer):
    texts = ["one", "two words", "", "三"]

    async def both() -> tuple[list[list[int]], list[list[int]]]:
        return await qwen.encode_batch_async(texts), [await qwen.encode_async(text) for text in texts]

    batch, single = asyncio.run(both())
    assert batch == single == [qwen.encode(text) for text in texts]


def test_the_event_loop_stays_free_while_encoding(byte_tokenizer: Tokenizer):
    async def count_turns() -> int:
        work = asyncio.create_task(byte_tokenizer.encode_async("a b " * 200_000))
        turns = 0
        while not work.done():
            await asyncio.sleep(0)
            turns += 1
        assert len(work.result()) == 800_000
        return turns

    assert asyncio.run(count_turns()) > 100


def test_text_that_is_no_unicode(byte_tokenizer: Tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate"):
        byte_tokenizer.encode("a\ud800b")


def test_byte_caps():
    check_bytes(["é" * 5, ""], 10)
    for texts in (["é" * 5, "a"], ["a" * 10**6], ["\ud800" * 4]):
        with pytest.raises(InvalidRequest, match="more than 10 bytes"):
            check_bytes(texts, 10)


def test_a_vocabulary_larger_than_the_model(byte_tokenizer: Tokenizer):
    check_vocabulary(byte_tokenizer, 259)
    with pytest.raises(ConfigError, match="ids up to 258, the model only 258"):
        check_vocabulary(byte_tokenizer, 258)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"", "cannot be read"),
        (b'{"model": {"vocab"', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "no JSON object"),
        (b"{}", "model.vocab is missing"),
        (b'{"model": {"vocab": {"a": "b"}}, "decoder": {"type": "ByteLevel"}}', "no integer"),
        (b'{"model": {"vocab": {"a": 0}}}', "no decoder"),
        (b'{"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}', "WordPiece.*not understood"),
        (b'{"model": {"vocab": {"a": 0}}, "decoder": {"type": "ByteLevel"}, "added_tokens": [7]}', "not a tokenizer file"),
        (b'{"model": {"type": "Nope", "vocab": {"a": 0}}, "decoder": {"type": "ByteLevel"}}', "tokenizer.json"),
    ],
)
def test_missing_and_corrupt_files_are_refused_by_name(tmp_path: Path, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        Tokenizer(tmp_path)
    assert "tokenizer.json" in str(refused.value)


def test_a_corrupt_configuration_is_refused_by_name(tmp_path: Path):
    write_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)


def test_a_begin_token_outside_the_vocabulary_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="bos_token '<nope>'"):
        Tokenizer(edited(tmp_path, "tokenizer_config.json", bos_token="<nope>"))


def test_a_tokenizer_without_configuration_works(tmp_path: Path):
    write_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"


def test_truncation_saved_in_the_file_does_not_cut(tmp_path: Path):
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer(edited(tmp_path, "tokenizer.json", truncation=truncation))
    assert len(tokenizer.encode("abcdefgh")) == 8


def test_a_directory_can_be_moved(tmp_path: Path):
    (tmp_path / "a").mkdir()
    write_byte_tokenizer(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert Tokenizer(str(tmp_path / "b")).directory == tmp_path / "b"
