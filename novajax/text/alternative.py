"""One alternative of a request: a backend's Updates in, Pieces of text out. No I/O, no waiting.

Invariants: text and the tokens that made it leave together; a token leaves when all its text is certain; of a stop
string's tokens only those with text before it leave. Offsets are characters from the start of the alternative's text.
"""

from collections import deque
from collections.abc import Sequence

import msgspec

from novajax.core.errors import InternalError
from novajax.core.types import Failure, FinishReason, SamplingParams, Timing, TokenLogprobs, Update, Usage
from novajax.text.detokenizer import Detokenizer
from novajax.text.stop import StopFinder
from novajax.text.tokenizer import Tokenizer


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One likely token at a position."""

    token: int
    text: str
    data: bytes
    """The token's exact bytes; `text` has U+FFFD where they are no whole character."""
    logprob: float


class TextLogprob(msgspec.Struct, frozen=True, array_like=True):
    """TokenLogprobs with the text that OpenAI's shapes need."""

    token: int
    text: str
    data: bytes
    logprob: float
    rank: int
    offset: int
    """Characters of text before this token: of the alternative's text, or of the prompt's text for prompt logprobs."""
    top: tuple[TopLogprob, ...] = ()


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """News of one alternative. The last of each index has a finish_reason and usage."""

    index: int = 0
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TextLogprob, ...] = ()
    """Parallel to `tokens` when asked for, else empty."""
    prompt_logprobs: tuple[TextLogprob | None, ...] | None = None
    """Once, with the first piece of alternative 0."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string, or the stop token id from the request; None for the model's own end."""
    usage: Usage | None = None
    timing: Timing | None = None
    seed: int | None = None
    failure: Failure | None = None


def text_logprobs(tokenizer: Tokenizer, entry: TokenLogprobs, offset: int) -> TextLogprob:
    top = tuple(TopLogprob(token, tokenizer.token_text(token), tokenizer.token_bytes(token), logprob) for token, logprob in entry.top)
    text, data = tokenizer.token_text(entry.token), tokenizer.token_bytes(entry.token)
    return TextLogprob(entry.token, text, data, entry.logprob, entry.rank, offset, top)


class _Token(msgspec.Struct, frozen=True):
    token: int
    start: int
    """Characters of text before it."""
    end: int
    """Characters of text with it."""
    logprob: TextLogprob | None


class Alternative:
    """See the module docstring."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        index: int = 0,
        *,
        include_stop: bool = False,
        skip_special: bool = True,
    ):
        self.finished = False
        self.stopped_by: str | None = None
        """The stop string found; the engine is still to be told."""
        self._tokenizer, self._prompt, self._sampling, self._index = tokenizer, prompt_ids, sampling, index
        self._skip_special = skip_special
        self._detokenizer = Detokenizer(tokenizer, prompt_ids, skip_special=skip_special)
        self._finder = StopFinder(sampling.stop, include=include_stop)
        self._waiting: deque[_Token] = deque()
        self._received_tokens = 0
        self._length = 0
        """Characters of text so far, certain or not."""
        self._certain = 0
        """Characters that have left."""

    def absorb(self, update: Update) -> Piece | None:
        """The update's news, or None if all of it is held back. Sets `finished` or `stopped_by`."""
        text = self._read(update)
        failed = update.failure is not None
        if update.finish_reason is not None and self.stopped_by is None:
            text += self._rest()
        self.finished = update.finish_reason is not None and self.stopped_by is None
        released = self._released()
        prompt = None if update.prompt_logprobs is None else self._prompt_logprobs(update.prompt_logprobs)
        if not (self.finished or text or released or prompt is not None):
            return None
        return Piece(
            index=self._index,
            text=text,
            tokens=tuple(token.token for token in released),
            logprobs=tuple(token.logprob for token in released if token.logprob is not None),
            prompt_logprobs=prompt,
            finish_reason=update.finish_reason if self.finished else None,
            stop_reason=self._stop_token(update) if self.finished else None,
            usage=(update.usage or self._own_usage()) if self.finished or failed else None,
            timing=update.timing,
            seed=update.seed,
            failure=update.failure,
        )

    def ended(self, update: Update | None) -> Piece:
        """The last piece after a stop string; `update` is the engine's last word on the aborted sequence, if it came."""
        self.finished = True
        usage, cached = self._own_usage(), update.usage.cached_tokens if update and update.usage else 0
        return Piece(
            index=self._index,
            finish_reason="stop",
            stop_reason=self.stopped_by,
            usage=msgspec.structs.replace(usage, cached_tokens=cached),
            timing=update.timing if update else None,
            seed=update.seed if update else self._sampling.seed,
        )

    def _read(self, update: Update) -> str:
        """Takes the update's new tokens in, up to a stop string; returns the text that is certain."""
        repeated = self._received_tokens - update.start
        if update.tokens and repeated < 0:
            raise InternalError(f"tokens {self._received_tokens} to {update.start} of the answer were lost")
        text = ""
        for at in range(repeated, len(update.tokens)):
            self._received_tokens += 1
            text += self._take(update.tokens[at], update.logprobs[at] if update.logprobs else None)
            if self.stopped_by is not None:
                break
        return text

    def _take(self, token: int, logprob: TokenLogprobs | None) -> str:
        new = self._detokenizer.push(token)
        start, self._length = self._length, self._length + len(new)
        detailed = None if logprob is None else text_logprobs(self._tokenizer, logprob, start)
        self._waiting.append(_Token(token, start, self._length, detailed))
        return self._search(new)

    def _search(self, new: str) -> str:
        if self._received_tokens <= self._sampling.min_tokens:
            text = self._finder.unsearched(new)
        else:
            text, self.stopped_by = self._finder.push(new)
        self._certain += len(text)
        return text

    def _rest(self) -> str:
        """The text that was held back for an open character or a possible stop string."""
        new = self._detokenizer.flush()
        self._length += len(new)
        text = self._search(new)
        if self.stopped_by is None:
            rest = self._finder.flush()
            self._certain += len(rest)
            text += rest
        return text

    def _released(self) -> list[_Token]:
        """The waiting tokens whose text has left. After a stop string, also the one that it cut; those after it are dropped."""
        released: list[_Token] = []
        while self._waiting and (self._waiting[0].end <= self._certain or (self.stopped_by and self._waiting[0].start < self._certain)):
            released.append(self._waiting.popleft())
        return released

    def _prompt_logprobs(self, entries: tuple[TokenLogprobs | None, ...]) -> tuple[TextLogprob | None, ...]:
        found: list[TextLogprob | None] = []
        detokenizer, offset = Detokenizer(self._tokenizer, skip_special=self._skip_special), 0
        for token, entry in zip(self._prompt, entries, strict=True):
            found.append(None if entry is None else text_logprobs(self._tokenizer, entry, offset))
            offset += len(detokenizer.push(token))
        return tuple(found)

    def _stop_token(self, update: Update) -> int | None:
        return update.stop_token if update.stop_token in self._sampling.stop_token_ids else None

    def _own_usage(self) -> Usage:
        return Usage(len(self._prompt), self._received_tokens)
