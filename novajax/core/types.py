"""The values that cross processes: a request going in, updates coming out, and what a backend says of itself.

Everything here is a frozen `msgspec.Struct`, so that one definition serves memory, msgpack frames and tests. All
counts are tokens. Nothing here knows about text: stop strings are found where text is made (`novajax.text`).
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

MAX_TOP_LOGPROBS = 20
"""Most alternatives a token may report (OpenAI's own cap)."""
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_ALTERNATIVES = 64
"""Most answers (`n`) one request may ask for."""

FinishReason = Literal["stop", "length", "abort", "error"]
Priority = Literal["high", "medium", "low"]
Phase = Literal["starting", "loading", "compiling", "ready", "draining", "restarting", "stuck", "failed"]
"""restarting: it served, died and is being started again. stuck: it has work and completes no step; a restart follows."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn, and when to stop. Bounds are checked on decoding and by `core.checks`.

    The order is: penalties and bias on the logits, temperature, then top_k, top_p and min_p filters, then the draw with
    the key fold_in(key(seed), position). `temperature=0` is greedy.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    """0: no limit."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL, arXiv 1909.05858)."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """None: the engine draws one at admission and reports it."""
    n: Annotated[int, Meta(ge=1, le=MAX_ALTERNATIVES)] = 1
    """Answers wanted; `novajax.text` turns one request into n, answer i drawing with seed + i."""
    stop: tuple[str, ...] = ()
    stop_token_ids: Annotated[tuple[int, ...], Meta(max_length=MAX_STOP_TOKEN_IDS)] = ()
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    """End and stop tokens are banned before this many output tokens."""
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    """None: up to the model's context. 0: only score the prompt."""
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    """Token id -> number added to its logit."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """None: none. k: the drawn token's log probability and the k best alternatives (of the unmodified distribution)."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to continue. `n` > 1 and stop strings are already resolved by `novajax.text` when an engine sees it."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    priority: Priority = "medium"
    cache_salt: str = ""
    """Prefix pages are shared only between requests of the same salt (tenant)."""
    adapter: str = ""
    variant: str = ""
    """One of the card's `variants`; empty: the served one."""
    resumed: tuple[int, ...] = ()
    """Output tokens delivered already, before an engine was lost: the answer goes on behind them, and max_tokens,
    min_tokens, penalties and usage count them as output."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities at one position."""

    token: int
    logprob: float
    rank: int
    """1 = the most likely token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability), best first."""


class Usage(msgspec.Struct, frozen=True, array_like=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""


class Timing(msgspec.Struct, frozen=True, array_like=True):
    """Where a request's time went, in seconds from its arrival at the engine. None: not reached."""

    queued_s: float
    prefill_s: float | None = None
    decode_s: float | None = None
    preemptions: int = 0


class Failure(msgspec.Struct, frozen=True):
    """A typed error on the wire; `core.errors.from_failure` makes the exception again."""

    kind: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """News of one request. The last one has a finish_reason; after it nothing follows."""

    request_id: str
    start: int = 0
    """Index of tokens[0] among the output tokens: a replayed stream is deduplicated by it."""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Parallel to `tokens` when asked for, else empty."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """Once, with the first update; the first position has None."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The end or stop token that finished it; it is NOT among `tokens`."""
    failure: Failure | None = None
    usage: Usage | None = None
    """With the last update."""
    timing: Timing | None = None
    seed: int | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a front end needs to know of the model behind a backend."""

    id: str
    directory: str
    """Local directory that holds tokenizer.json, templates and generation_config.json."""
    vocab_size: int
    max_context_tokens: int
    max_request_tokens: int
    """The longest prompt + output this engine's KV pool can hold; at most max_context_tokens."""
    weights_digest: str
    created: int
    """Unix seconds."""
    end_token_ids: tuple[int, ...] = ()
    default_sampling: dict[str, float | int] = {}
    """temperature, top_p, top_k ... of the model's generation_config."""
    parameters: int | None = None
    variants: tuple[str, ...] = ("float",)
    """Precisions a request may ask for, by name of the profile or format: the served one first, the most precise one last."""


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """One process of an engine as its supervisor sees it."""

    rank: int
    phase: str
    pid: int | None = None
    host: str = ""
    step: int = 0
    """Plans completed in this epoch."""
    detail: str = ""


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """What quantization costs in service: means over the answers scored last by the served engine and by a more precise one."""

    scored: int
    """Answers so far."""
    kl: float
    """A lower bound of KL(precise || served) per token, in nats."""
    top1_agreement: float
    """Share of tokens at which both find the same one likeliest."""
    score: float
    """exp(-kl): 1 is no loss."""
    alert: bool = False
    switched: bool = False
    """New requests go to the more precise engine."""


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """A backend's state now. Counters only grow; None means unmeasured."""

    phase: Phase
    detail: str = ""
    requests_running: int = 0
    requests_waiting: int = 0
    kv_pages_free: int = 0
    kv_pages_cached: int = 0
    kv_pages_held: int = 0
    kv_pages_total: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    drafted_tokens: int = 0
    """Guesses of next tokens that were checked, and those of them that were right."""
    accepted_tokens: int = 0
    preemptions: int = 0
    aborted_queued: int = 0
    """Sequences aborted before they ever had a place, before their first token, and after it."""
    aborted_prefill: int = 0
    aborted_decode: int = 0
    steps: int = 0
    compilations_after_ready: int = 0
    identity_violations: int = 0
    host_step_s: float | None = None
    """Median host time (plan, pack, dispatch, commit) of the last steps."""
    step_phases_s: dict[str, float] = {}
    """Median seconds of the last steps by phase: plan, dispatch, device, commit, publish."""
    device_busy: float | None = None
    """Share of wall time the device was working, over the last steps."""
    pid: int | None = None
    startup: dict[str, float] = {}
    """Seconds by phase of the start: import, load, allocate, compile ..."""
    epoch: int = 0
    """Counts the starts of the engine's processes; 0: nobody counts."""
    components: tuple[Component, ...] = ()
    restarts: dict[str, int] = {}
    """Restarts of the engine's processes by reason."""
    recovery_s: float | None = None
    """From the detection of the last fault to serving again."""
    quality: Quality | None = None
    """None: unmeasured."""
