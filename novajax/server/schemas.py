"""What clients may send: OpenAI's request bodies with vLLM's extra sampling fields. Bounds are checked while decoding.

Unknown fields pass, because clients send many; fields that are known and would change the answer, but that this
version does not have, are declared in `Refused` and refused by name.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from novajax.core.errors import Forbidden, InvalidRequest, Unsupported
from novajax.core.types import MAX_ALTERNATIVES, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, MAX_TOP_LOGPROBS

MAX_MESSAGES = 2048
MAX_PARTS = 256
"""Content parts in one message."""

Tokens = Annotated[int, Meta(ge=0, lt=2**31)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
Name = Annotated[str, Meta(max_length=256)]
StopText = Annotated[str, Meta(max_length=256)]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class Refused(msgspec.Struct, kw_only=True):
    """Features that other servers have. Anything but 'not used' is an Unsupported that names the field."""

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    json_schema: Any = None
    regex: Any = None
    grammar: Any = None
    ebnf: Any = None
    suffix: Any = None
    best_of: Any = None
    use_beam_search: Any = None
    audio: Any = None
    modalities: Any = None
    web_search_options: Any = None
    prompt_embeds: Any = None
    documents: Any = None
    truncate_prompt_tokens: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    logits_processors: Any = None
    chat_template: Any = None


_UNUSED: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "truncate_prompt_tokens": (-1,),
}
"""Values that ask for nothing, beside null, false and the empty ones."""


def refuse_unsupported(body: Refused) -> None:
    """Raises Unsupported for the first used feature that is not there; Forbidden for a template from the request."""
    if body.chat_template is not None:
        raise Forbidden("chat templates from requests are not run; the server's own is used", param="chat_template")
    for field in Refused.__struct_fields__:
        value = getattr(body, field)
        if value is None or value is False or value in ("", [], {}) or value in _UNUSED.get(field, ()):
            continue
        if field == "best_of":
            _refuse_best_of(value, getattr(body, "n", None) or 1)
            continue
        raise Unsupported(f"{field} is not supported by this version", param=field)


def _refuse_best_of(value: Any, n: int) -> None:
    if type(value) is not int or value < 1:
        raise InvalidRequest("best_of must be an integer of 1 or more", param="best_of")
    if value != n:
        raise Unsupported("best_of other than n is not supported", param="best_of")


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generation(Refused, kw_only=True):
    """The fields that chat and completions share. None: not given, so the model's own default holds."""

    model: Name | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    """-1 and 0: no limit."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_ALTERNATIVES)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool = False
    min_tokens: Tokens | None = None
    max_tokens: Tokens | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=MAX_LOGIT_BIAS)] | None = None
    prompt_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | Literal["high", "medium", "low"] | None = None
    """Numbers as in vLLM: below 0 is high, above 0 is low."""
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    quantization: Name | None = None
    """A variant that is loaded, by profile or format; `auto` or none: the served one. fp32, fp16 and bf16: the unrounded one."""
    quality_preference: Literal["speed", "balanced", "quality"] | None = None
    """quality: the most precise variant that is loaded. `quantization` wins."""
    user: Annotated[str, Meta(max_length=1024)] | None = None
    """Read by nothing."""


class Part(msgspec.Struct, frozen=True):
    """A content part; only text is served."""

    type: Annotated[str, Meta(max_length=64)]
    text: str | None = None


class Message(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Meta(min_length=1, max_length=MAX_PARTS)] | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None


class ChatRequest(Generation, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    """Templates write the special tokens themselves."""
    chat_template_kwargs: dict[str, Any] | None = None
    echo: bool | None = None


class CompletionRequest(Generation, kw_only=True):
    prompt: str | list[Any]
    """One string, several, one list of token ids, or several: `prompts_of` checks which."""
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    add_special_tokens: bool = True


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """vLLM's: either a prompt or messages."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    """None: true for a prompt, false for messages."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Any = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: Annotated[list[TokenId], Meta(max_length=2**22)]
    model: Name | None = None


def prompts_of(prompt: str | list[Any], max_prompts: int) -> list[str] | list[list[int]]:
    """The prompts in a completions request: all strings or all lists of token ids. Raises InvalidRequest."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt is empty", param="prompt")
    if type(prompt[0]) is int:
        return [_convert(prompt, list[TokenId])]
    if len(prompt) > max_prompts:
        raise InvalidRequest(f"{len(prompt)} prompts; at most {max_prompts} are served in one request", param="prompt")
    if isinstance(prompt[0], str):
        return _convert(prompt, list[str])
    return _convert(prompt, list[list[TokenId]])


def _convert[T](value: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"prompt: {error}", param="prompt") from None
