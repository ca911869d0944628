"""What a model's text files say of token ids: do they fit the vocabulary, which tokens end an answer, how to sample.

Invariants: ids that plain text or the chat template can produce are inside the vocabulary, or the model is refused;
sampling defaults pass the same bounds as a request's. It reads JSON only and does not tokenize.
"""

import json
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from novajax.core.errors import ConfigError
from novajax.core.types import SamplingParams

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""The keys of generation_config.json that are defaults for a request."""


class Added(msgspec.Struct, frozen=True):
    id: int
    content: str


class Generation(msgspec.Struct, frozen=True):
    """How this model wants to generate."""

    default_sampling: dict[str, float | int]
    end_token_ids: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} when there is no file. Raises ConfigError naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds no JSON object")
    return value


def read_generation(directory: Path, config: dict[str, Any], vocab: int) -> Generation:
    """Defaults and end tokens from generation_config.json, config.json and tokenizer_config.json.

    End tokens are those of generation_config.json (else config.json) and the tokenizer's own: chat models often name the
    end of a turn only there. Raises ConfigError naming file and key, also for a tokenizer that does not fit `vocab`.
    """
    tokenizer = read_json(directory / "tokenizer_config.json")
    added = check_tokenizer(directory, tokenizer, vocab)
    generation = read_json(directory / "generation_config.json")
    defaults = {key: generation[key] for key in SAMPLING if generation.get(key) is not None}
    if defaults.get("top_k") == -1:
        del defaults["top_k"]
    bounds = get_type_hints(SamplingParams, include_extras=True)
    for key, value in defaults.items():
        try:
            msgspec.convert(value, bounds[key])
        except msgspec.ValidationError as error:
            raise ConfigError(f"{directory / 'generation_config.json'}: {key}={value!r}: {error}", param=key) from None
    file, named = "generation_config.json", generation.get("eos_token_id")
    if named is None:
        file, named = "config.json", config.get("eos_token_id")
    ends = {}
    for token in named if isinstance(named, list) else [] if named is None else [named]:
        if type(token) is not int or token >= vocab:
            raise ConfigError(f"{directory / file}: eos_token_id={named!r} is not inside the vocabulary of {vocab}", param="eos_token_id")
        if token >= 0:  # -1 is an old way to say none
            ends[token] = None
    own = _content(tokenizer.get("eos_token"))
    if own in added and added[own] < vocab:
        ends[added[own]] = None
    return Generation(defaults, tuple(ends))


def check_tokenizer(directory: Path, tokenizer: dict[str, Any], vocab: int) -> dict[str, int]:
    """Refuses a tokenizer.json whose ids do not fit `vocab`; gives its added tokens, content -> id. {} without a file.

    An added token beyond the vocabulary is let pass when nothing here would ever produce it: Gemma 3's text models carry
    the image token of their siblings. The begin and end tokens and whatever the chat template writes must fit.
    """
    path = directory / "tokenizer.json"
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{path}: not a tokenizer file: {error}") from None
    pieces = file.model.vocab
    last = max(pieces.values(), default=-1) if isinstance(pieces, dict) else len(pieces) - 1
    added = {token.content: token.id for token in file.added_tokens}
    if last >= vocab and not set(added.values()).issuperset(_beyond(pieces, vocab)):
        raise ConfigError(f"config.json: vocab_size={vocab} is smaller than the tokenizer's {last + 1} ({path})", param="vocab_size")
    template = _template(directory, tokenizer)
    needed = {_content(tokenizer.get(name)) for name in ("bos_token", "eos_token")}
    for content, token in added.items():
        if token >= vocab and (content in needed or content in template):
            raise ConfigError(f"config.json: vocab_size={vocab} has no room for {content!r} = {token} of {path}", param="vocab_size")
    return added


def _beyond(pieces: dict[str, int] | list[Any], vocab: int) -> set[int]:
    return {token for token in pieces.values() if token >= vocab} if isinstance(pieces, dict) else set(range(vocab, len(pieces)))


def _content(token: Any) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _template(directory: Path, tokenizer: dict[str, Any]) -> str:
    try:
        text = (directory / "chat_template.jinja").read_text()
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{directory / 'chat_template.jinja'}: {error}") from None
    return text + json.dumps(tokenizer.get("chat_template", ""), ensure_ascii=False)


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[Any] = []


class _TokenizerFile(msgspec.Struct):
    model: _Model
    added_tokens: list[Added] = []
