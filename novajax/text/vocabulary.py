"""What each token id means in bytes, read once from tokenizer.json's vocabulary, added tokens and decoder.

Invariant: joining the bytes of ids and reading them as UTF-8 gives what the `tokenizers` library decodes, wherever those
bytes are valid UTF-8; so text can be streamed token by token at constant cost. Where they are not, U+FFFD stands for
each maximal broken part, as in the WHATWG encoding standard (the library's byte-fallback decoder gives one for each byte,
and spoils whole characters beside a broken one). A decoder that cannot be read this way is refused by name.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from novajax.core.errors import ConfigError

EVERY_SPACE = -1
"""A `lead` that drops every space of the first token (the Metaspace decoder's rule)."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_Step = Callable[[str | bytes], str | bytes]


def _byte_level_alphabet() -> dict[int, int]:
    """GPT-2's printable stand-ins for the 256 bytes: code point -> byte. Printable Latin-1 stands for itself, the
    other 68 bytes are counted up from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(rest)}


_BYTE_OF = MappingProxyType(_byte_level_alphabet())


def _byte_level(token: str | bytes) -> str | bytes:
    if isinstance(token, bytes) or any(ord(c) not in _BYTE_OF for c in token):
        return token  # an added token's literal text
    return bytes(_BYTE_OF[ord(c)] for c in token)


def _byte_fallback(token: str | bytes) -> str | bytes:
    if isinstance(token, str) and (match := _BYTE_TOKEN.fullmatch(token)):
        return bytes([int(match[1], 16)])
    return token


def _replace(old: str, new: str) -> _Step:
    return lambda token: token.replace(old, new) if isinstance(token, str) else token


def read_decoder(decoder: Any, where: str) -> tuple[list[_Step], int]:
    """tokenizer.json's `decoder` as (steps from a token's text to its bytes, spaces to drop at the start of a text)."""
    if not isinstance(decoder, dict):
        raise ConfigError(f"{where}: no decoder, so the spaces between tokens are unknown")
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    steps: list[_Step] = []
    lead, fused = 0, False
    for part in parts:
        match part:
            case {"type": "ByteLevel"}:
                steps.append(_byte_level)
            case {"type": "ByteFallback"}:
                steps.append(_byte_fallback)
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                steps.append(_replace(old, new))
            case {"type": "Metaspace", "replacement": str(mark)}:
                steps.append(_replace(mark, " "))
                prepends = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") != "never"
                lead = EVERY_SPACE if prepends else 0
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                lead = start
            case _:
                raise ConfigError(f"{where}: the decoder {str(part)[:200]} is not understood")
    return steps, lead


def read_vocabulary(document: Mapping[str, Any], where: str) -> dict[int, str]:
    """id -> token text, of the model, without added tokens. Raises ConfigError if the document has another shape."""
    vocab = document.get("model", {}).get("vocab")
    if isinstance(vocab, dict):
        texts = {token_id: text for text, token_id in vocab.items()}
    elif isinstance(vocab, list) and all(isinstance(entry, list) and entry for entry in vocab):
        texts = {token_id: entry[0] for token_id, entry in enumerate(vocab)}
    else:
        raise ConfigError(f"{where}: model.vocab is missing or neither a map nor a list")
    if not all(isinstance(token_id, int) and isinstance(text, str) for token_id, text in texts.items()):
        raise ConfigError(f"{where}: model.vocab holds an id that is no integer or a token that is no text")
    return texts


def token_bytes(texts: Mapping[int, str], added: Mapping[int, str], steps: list[_Step]) -> list[bytes]:
    """The bytes of ids 0 .. highest; an id nobody claims has none. Added tokens outside the vocabulary stand for their own text."""
    table = [b""] * (max([*texts, *added], default=-1) + 1)
    literal = {i for i, text in added.items() if texts.get(i) != text}
    for token_id, text in {**texts, **added}.items():
        value: str | bytes = text
        for step in steps:
            if not (token_id in literal and step is _byte_level):
                value = step(value)
        table[token_id] = value.encode("utf-8", "replace") if isinstance(value, str) else value
    return table


def strip_lead(data: bytes, lead: int) -> tuple[bytes, int]:
    """Applies `lead` to the first bytes of a text: (what remains of them, the lead left for what follows)."""
    if lead == EVERY_SPACE:
        return data.replace(b" ", b""), 0
    kept = data.lstrip(b" ")
    dropped = min(lead, len(data) - len(kept))
    return data[dropped:], lead - dropped if dropped == len(data) else 0
