"""Text to token ids and back, from a Hugging Face directory (tokenizer.json and tokenizer_config.json).

Control tokens (every special token, and added ones of the form <|...|>) can be forged in text only on purpose: the
library instance knows them under secret names, so that their own text is ordinary text to it, and `encode` puts the
secret names in only where `parse_special` allows it. `novajax.text.template` relies on this.

Encoding runs through `encode_batch_fast`, which works outside the interpreter lock; the `_async` forms also leave the
event loop. Byte caps are the caller's (`check_bytes`). It knows nothing of models beyond `check_vocabulary`.
"""

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
import tokenizers

from novajax.core.errors import ConfigError, InvalidRequest
from novajax.text.guard import any_of
from novajax.text.vocabulary import read_decoder, read_vocabulary, strip_lead, token_bytes

_DELIMITER = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)


def check_vocabulary(tokenizer: "Tokenizer", model_vocabulary: int) -> None:
    """Raises ConfigError if the tokenizer has an id that a model of `model_vocabulary` rows does not."""
    if tokenizer.size > model_vocabulary:
        raise ConfigError(
            f"{tokenizer.directory}: the tokenizer has ids up to {tokenizer.size - 1}, the model only {model_vocabulary} rows"
        )


def check_bytes(texts: Sequence[str], max_bytes: int, param: str = "prompt") -> None:
    """Raises InvalidRequest if the texts together are longer than max_bytes in UTF-8: call it before any encoding."""
    size_bytes = 0
    for text in texts:
        # The length in characters is a lower bound that costs nothing.
        size_bytes += len(text) if len(text) > max_bytes else len(text.encode("utf-8", "surrogatepass"))
        if size_bytes > max_bytes:
            raise InvalidRequest(f"the text has more than {max_bytes} bytes", param=param)


class Tokenizer:
    """See the module docstring. Thread-safe after construction: nothing in it changes."""

    def __init__(self, directory: str | Path):
        """Raises ConfigError, naming the file, for what is missing, corrupt or not understood."""
        self.directory = Path(directory)
        self.config = _read_json(self.directory / "tokenizer_config.json", required=False)
        path = self.directory / "tokenizer.json"
        document, where = _read_json(path, required=True), str(path)
        try:
            added: dict[int, dict[str, Any]] = {token["id"]: token for token in document.get("added_tokens") or []}
            added |= _added_by_config(self.config, added)
            texts = read_vocabulary(document, where)
            steps, self.lead = read_decoder(document.get("decoder"), where)
            self._bytes = token_bytes(texts, {i: token["content"] for i, token in added.items()}, steps)
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"{where}: not a tokenizer file: {error!r}") from None
        self.size = len(self._bytes)
        """Highest id + 1."""
        self.special_ids = frozenset(i for i, token in added.items() if token.get("special"))
        """Ids that `decode` leaves out on request."""
        control = {token["content"]: i for i, token in added.items() if _is_control(token)}
        self.control_tokens: dict[str, int] = control
        """Text -> id of every token that text from users must not become."""
        self._library, self._aliases, self._true_ids = _guarded(document, added, control, where)
        self._control_pattern = any_of(control)
        self.special_map = _special_map(self.directory, self.config)
        self.bos_token, self.eos_token = self.special_map.get("bos_token"), self.special_map.get("eos_token")
        self.bos_id, self.eos_id = self._id_of(self.bos_token, "bos_token"), self._id_of(self.eos_token, "eos_token")
        self._prefix, self._suffix = self._edges()

    def same_tokens(self, other: "Tokenizer") -> bool:
        """Whether every id stands for the same bytes in both."""
        return self._bytes == other._bytes

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False, guard: str = "") -> list[int]:
        """The ids of one text; InvalidRequest if it is not valid Unicode.

        add_special: with the begin (and end) tokens that this tokenizer adds, unless the text has them already.
        parse_special: text that spells a control token becomes that token; otherwise it stays text.
        guard: a character that is deleted, but only after control tokens were looked for: inside such a text it keeps it text.
        """
        return self.encode_batch([text], add_special=add_special, parse_special=parse_special, guard=guard)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special: bool = True, parse_special: bool = False, guard: str = ""
    ) -> list[list[int]]:
        """`encode` of each, on all cores."""
        if parse_special:
            texts = [self._control_pattern.sub(lambda match: self._aliases[match[0]], text) for text in texts]
        if guard:
            texts = [text.replace(guard, "") for text in texts]
        try:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequest("the text holds a lone surrogate, which is no character") from None
        except Exception as error:
            raise InvalidRequest(f"the tokenizer cannot encode this text: {error}") from None
        return [self._finished(encoding.ids, add_special) for encoding in encodings]

    async def encode_async(self, text: str, *, add_special: bool = True, parse_special: bool = False, guard: str = "") -> list[int]:
        """`encode` in a worker thread."""
        return await anyio.to_thread.run_sync(lambda: self.encode(text, add_special=add_special, parse_special=parse_special, guard=guard))

    async def encode_batch_async(self, texts: Sequence[str], *, add_special: bool = True, parse_special: bool = False) -> list[list[int]]:
        """`encode_batch` in a worker thread."""
        return await anyio.to_thread.run_sync(lambda: self.encode_batch(texts, add_special=add_special, parse_special=parse_special))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids as a whole text (a sentencepiece leading space dropped). Ids without a token have no text."""
        data, lead = bytearray(), self.lead
        for token in ids:
            piece = self.token_bytes(token, skip_special)
            if lead and piece:
                piece, lead = strip_lead(piece, lead)
            data += piece
        return data.decode("utf-8", "replace")

    def token_bytes(self, token: int, skip_special: bool = False) -> bytes:
        """The bytes this id adds to a text; they need not be whole characters."""
        if not 0 <= token < self.size or (skip_special and token in self.special_ids):
            return b""
        return self._bytes[token]

    def token_text(self, token: int) -> str:
        """The bytes as text, with U+FFFD where they are no whole character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def _finished(self, ids: list[int], add_special: bool) -> list[int]:
        if self._true_ids:
            ids = [self._true_ids.get(token, token) for token in ids]
        if add_special:
            prefix, suffix = self._prefix, self._suffix
            if prefix and ids[: len(prefix)] != prefix:
                ids = prefix + ids
            if suffix and ids[-len(suffix) :] != suffix:
                ids = ids + suffix
        return ids

    def _id_of(self, token: str | None, name: str) -> int | None:
        if token is None:
            return None
        found = self.control_tokens.get(token)
        if found is None:
            found = self._library.token_to_id(token)
        if found is None:
            raise ConfigError(f"{self.directory}: {name} {token!r} is not in the vocabulary")
        return self._true_ids.get(found, found)

    def _edges(self) -> tuple[list[int], list[int]]:
        """Ids put before and after every text: the file's post-processor, overruled by add_bos_token and add_eos_token."""
        probe = self._library.encode("a", add_special_tokens=False).ids
        whole = self._library.encode("a", add_special_tokens=True).ids
        before = next((i for i in range(len(whole) - len(probe) + 1) if whole[i : i + len(probe)] == probe), 0)
        prefix, suffix = whole[:before], whole[before + len(probe) :]
        for name, token, edge in (("add_bos_token", self.bos_id, prefix), ("add_eos_token", self.eos_id, suffix)):
            wanted = self.config.get(name)
            if wanted is None or token is None:
                continue
            if wanted and not edge:
                edge.append(token)
            elif not wanted and edge == [token]:
                edge.clear()
        return prefix, suffix


def _is_control(token: dict[str, Any]) -> bool:
    # One character cannot be told from text.
    return len(token["content"]) > 1 and bool(token.get("special") or _DELIMITER.fullmatch(token["content"]))


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        if required:
            raise ConfigError(f"{path} is missing: a tokenizer.json of the Hugging Face kind is needed") from None
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is no JSON object")
    return document


def _added_by_config(config: dict[str, Any], added: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Tokens that only tokenizer_config.json's added_tokens_decoder names."""
    more = config.get("added_tokens_decoder") or {}
    return {int(i): {**token, "id": int(i)} for i, token in more.items() if int(i) not in added}


def _guarded(
    document: dict[str, Any], added: dict[int, dict[str, Any]], control: dict[str, int], where: str
) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
    """(library instance in which control tokens have secret names, text -> secret name, its ids -> the true ids where they differ)."""
    # Private-use characters around a nonce: no text that we are sent can spell it.
    nonce = secrets.token_hex(16)
    aliases = {text: f"\U00100000{nonce}:{token_id}\U00100001" for text, token_id in control.items()}
    tokens = [{**token, "content": aliases.get(token["content"], token["content"])} for token in added.values()]
    model = _renamed(document["model"], aliases)
    guarded = {**document, "added_tokens": tokens, "model": model, "truncation": None, "padding": None}
    try:
        library = tokenizers.Tokenizer.from_str(msgspec.json.encode(guarded).decode())
    except Exception as error:
        raise ConfigError(f"{where}: {error}") from None
    true_ids: dict[int, int] = {}
    for token in tokens:
        found = library.token_to_id(token["content"])
        if found is None or (library.encode(token["content"], add_special_tokens=False).ids[-1:] != [found] and token.get("special")):
            raise ConfigError(f"{where}: the added token {added[token['id']]['content']!r} cannot be reached")
        if found != token["id"]:
            true_ids[found] = token["id"]
    return library, aliases, true_ids


def _renamed(model: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """The model with secret names in its vocabulary too, if it takes whole words from there and not merges alone."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {**model, "vocab": [[aliases.get(text, text), *score] for text, *score in vocab]}
    if model.get("ignore_merges"):
        unknown = model.get("unk_token")
        return {**model, "vocab": {text if text == unknown else aliases.get(text, text): i for text, i in vocab.items()}}
    return model


def _special_map(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, unk_token ... -> text, from special_tokens_map.json and, before it, tokenizer_config.json."""
    merged = _read_json(directory / "special_tokens_map.json", required=False) | {k: v for k, v in config.items() if v is not None}
    found: dict[str, str] = {}
    for name, value in merged.items():
        if name.endswith("_token") and not name.startswith("add_"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found
