"""A chat completion's reply, whole or in chunks, from pieces of text.

Invariants: the first chunk of each choice says the role; text, its logprobs and the finish reason go out in the order they came.
"""

from collections.abc import Iterator, Sequence

from msgspec import UNSET, UnsetType

from novajax.server.accounts import Account
from novajax.server.logprobs import chat_logprobs, prompt_logprobs
from novajax.server.replies import AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatReply, Delta, PromptLogprobs
from novajax.server.schemas import ChatRequest, StreamOptions
from novajax.server.streams import DONE, frame
from novajax.text.alternative import Piece
from novajax.text.completion import Completion


class ChatWriter:
    """`model` and `fingerprint` are what the reply shall say."""

    def __init__(self, body: ChatRequest, account: Account, *, id: str, created: int, model: str, fingerprint: str):
        self._id = id
        self._created = created
        self._model = model
        self._fingerprint = fingerprint
        self._account = account
        self._logprobs = bool(body.logprobs)
        self._options = body.stream_options or StreamOptions()
        self._begun: set[int] = set()

    def reply(self, answers: Sequence[Sequence[Completion]]) -> ChatReply:
        """The whole reply; the account must have been told of the answers."""
        choices = [
            ChatChoice(
                index=answer.index,
                message=AssistantMessage(answer.text),
                logprobs=chat_logprobs(answer.logprobs) if self._logprobs else None,
                finish_reason=answer.finish_reason,
                stop_reason=answer.stop_reason,
            )
            for answer in answers[0]
        ]
        scored = answers[0][0].prompt_logprobs
        return ChatReply(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self._account.usage(),
            system_fingerprint=self._fingerprint,
            timings=self._account.timings(),
            prompt_logprobs=UNSET if scored is None else prompt_logprobs(scored),
        )

    def encode(self, number: int, piece: Piece) -> Iterator[bytes]:
        """The frames of one piece."""
        scored = UNSET if piece.prompt_logprobs is None else prompt_logprobs(piece.prompt_logprobs)
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            yield self._chunk([ChatChunkChoice(index=piece.index, delta=Delta("", "assistant"))], scored)
        if not (piece.text or piece.finish_reason or piece.logprobs):
            return
        choice = ChatChunkChoice(
            index=piece.index,
            delta=Delta(piece.text) if piece.text or not piece.finish_reason else Delta(),
            logprobs=chat_logprobs(piece.logprobs) if self._logprobs and piece.logprobs else None,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason if piece.finish_reason else UNSET,
        )
        yield self._chunk([choice])

    def last(self) -> Iterator[bytes]:
        """What follows the last piece."""
        if self._options.include_usage:
            yield frame(
                ChatChunk(
                    id=self._id,
                    created=self._created,
                    model=self._model,
                    choices=[],
                    system_fingerprint=self._fingerprint,
                    usage=self._account.usage(),
                    timings=self._account.timings(),
                )
            )
        yield DONE

    def _chunk(self, choices: list[ChatChunkChoice], scored: PromptLogprobs | UnsetType = UNSET) -> bytes:
        usage = UNSET
        if self._options.continuous_usage_stats:
            usage = self._account.usage()
        elif self._options.include_usage:
            usage = None
        return frame(
            ChatChunk(
                id=self._id,
                created=self._created,
                model=self._model,
                choices=choices,
                system_fingerprint=self._fingerprint,
                usage=usage,
                prompt_logprobs=scored,
            )
        )
