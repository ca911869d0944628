"""A text completion's reply, whole or in chunks, from pieces of text; with `echo` the prompt's text and logprobs come first.

Choice number = prompt number x n + alternative. Invariant: text offsets count from the start of the choice's own text.
"""

from collections.abc import Iterator, Sequence

from msgspec import UNSET, UnsetType

from novajax.server.accounts import Account
from novajax.server.logprobs import echoed_logprobs, prompt_logprobs, text_logprobs
from novajax.server.replies import PromptLogprobs, TextChoice, TextLogprobs, TextReply, Timings, UsageReply
from novajax.server.schemas import CompletionRequest, StreamOptions
from novajax.server.streams import DONE, frame
from novajax.text.alternative import Piece, TextLogprob
from novajax.text.completion import Completion


class Echo:
    """What one prompt adds to the front of its choices."""

    def __init__(self, text: str, first_token: str):
        self.text = text
        self.logprobs: TextLogprobs | None = None
        self._first_token = first_token

    def score(self, entries: Sequence[TextLogprob | None]) -> None:
        """The prompt's logprobs, which come with the first alternative."""
        self.logprobs = echoed_logprobs(self._first_token, entries)


class TextWriter:
    """`echoes`: one for each prompt, or none when the prompts are not wanted back."""

    def __init__(
        self, body: CompletionRequest, account: Account, echoes: Sequence[Echo], *, id: str, created: int, model: str, fingerprint: str
    ):
        self._id = id
        self._created = created
        self._model = model
        self._fingerprint = fingerprint
        self._account = account
        self._echoes = echoes
        self._n = body.n or 1
        self._logprobs = body.logprobs is not None
        self._prompt_logprobs = body.prompt_logprobs is not None
        self._options = body.stream_options or StreamOptions()
        self._begun: set[int] = set()

    def reply(self, answers: Sequence[Sequence[Completion]]) -> TextReply:
        """The whole reply; the account must have been told of the answers."""
        choices: list[TextChoice] = []
        for number, alternatives in enumerate(answers):
            scored = alternatives[0].prompt_logprobs
            self._score(number, scored)
            for answer in alternatives:
                index = self._n * number + answer.index
                text, logprobs = self._opening(number, answer.text, answer.logprobs)
                choices.append(
                    TextChoice(
                        index=index,
                        text=text,
                        logprobs=logprobs,
                        finish_reason=answer.finish_reason,
                        stop_reason=answer.stop_reason,
                        prompt_logprobs=self._prompt_logprobs_of(scored),
                    )
                )
        return self._whole(choices)

    def encode(self, number: int, piece: Piece) -> Iterator[bytes]:
        """The frame of one piece."""
        index = self._n * number + piece.index
        self._score(number, piece.prompt_logprobs)
        if index not in self._begun:
            self._begun.add(index)
            text, logprobs = self._opening(number, piece.text, piece.logprobs)
        else:
            shift = len(self._echoes[number].text) if self._echoes else 0
            text = piece.text
            logprobs = text_logprobs(piece.logprobs, shift) if self._logprobs and piece.logprobs else None
        scored = self._prompt_logprobs_of(piece.prompt_logprobs)
        if not (text or logprobs or piece.finish_reason or scored is not UNSET):
            return
        choice = TextChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason if piece.finish_reason else UNSET,
            prompt_logprobs=scored,
        )
        usage = UNSET
        if self._options.continuous_usage_stats:
            usage = self._account.usage()
        elif self._options.include_usage:
            usage = None
        yield frame(self._chunk([choice], usage))

    def last(self) -> Iterator[bytes]:
        """What follows the last piece."""
        if self._options.include_usage:
            yield frame(self._whole([]))
        yield DONE

    def _whole(self, choices: list[TextChoice]) -> TextReply:
        """With usage and timings."""
        return self._chunk(choices, self._account.usage(), self._account.timings())

    def _chunk(self, choices: list[TextChoice], usage: UsageReply | UnsetType | None, timings: Timings | UnsetType = UNSET) -> TextReply:
        return TextReply(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            system_fingerprint=self._fingerprint,
            usage=usage,
            timings=timings,
        )

    def _score(self, number: int, scored: Sequence[TextLogprob | None] | None) -> None:
        if self._echoes and self._logprobs and scored is not None:
            self._echoes[number].score(scored)

    def _opening(self, number: int, text: str, entries: Sequence[TextLogprob]) -> tuple[str, TextLogprobs | None]:
        """A choice's first text and logprobs, with the prompt before them if it is echoed."""
        if not self._echoes:
            return text, text_logprobs(entries, 0) if self._logprobs else None
        echo = self._echoes[number]
        return echo.text + text, text_logprobs(entries, len(echo.text), echo.logprobs) if self._logprobs else None

    def _prompt_logprobs_of(self, scored: Sequence[TextLogprob | None] | None) -> PromptLogprobs | UnsetType:
        return UNSET if scored is None or not self._prompt_logprobs else prompt_logprobs(scored)
