"""What goes back: OpenAI's response objects, with the extra fields that vLLM's clients know and our `timings`.

UNSET fields are left out, None is written as null. Nothing here computes; see `chat`, `completions` and `accounts`.
"""

import msgspec
from msgspec import UNSET, UnsetType


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class UsageReply(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(msgspec.Struct, frozen=True):
    """Where the time went; of several sequences, the slowest. null: not measured."""

    queued_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    tokens_per_s: float | None = None
    """Output tokens of all sequences over decode_s."""


class ChatTop(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[ChatTop]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatLogprob] | None
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """Completions' four parallel lists. The first token of an echoed prompt has null in two of them."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, frozen=True):
    """vLLM's: one entry of the map from token id."""

    logprob: float
    rank: int | None
    decoded_token: str


type PromptLogprobs = list[dict[int, PromptLogprob] | None]


class AssistantMessage(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None = None


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReply
    system_fingerprint: str
    timings: Timings
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    object: str = "chat.completion"


class Delta(msgspec.Struct, frozen=True):
    content: str | UnsetType = UNSET
    role: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: UsageReply | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    object: str = "chat.completion.chunk"


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of a completion, and of its chunks (where finish_reason is null but in the last)."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class TextReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str
    usage: UsageReply | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
    object: str = "text_completion"


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int
    max_model_len: int
    owned_by: str = "novajax"
    root: str
    object: str = "model"


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelEntry]
    object: str = "list"


class TokenizeReply(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(msgspec.Struct, frozen=True):
    prompt: str
