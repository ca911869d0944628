"""One streaming request to an OpenAI-compatible server, timed; and clients that misbehave on purpose.

Knows the wire (HTTP, server-sent events) and nothing of arrival patterns. Every way a request can end is an outcome;
nothing raises.
"""

import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
import msgspec

from bench.traffic import Planned

Outcome = Literal["ok", "shed", "refused", "failed", "broken", "vanished", "unsent"]
"""ok: complete. shed: 429 or 503. refused: another 4xx. failed: another 5xx or an error event. broken: the connection or the stream
ended early, or a time-out. vanished: this client left, as planned. unsent: the generator's own bound on open requests was reached."""


class Sample(msgspec.Struct, kw_only=True):
    """What one request met. Times are seconds from the moment it was sent."""

    index: int
    sent_at_s: float
    """After the start of the run."""
    late_s: float = 0.0
    """How far behind its planned moment it left: the load generator's own lag."""
    outcome: Outcome
    status: int | None = None
    planned_bad: bool = False
    planned_vanish: bool = False
    retry_after: str | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None
    gaps_s: list[float] = []
    """Between pieces of the answer that arrived apart."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    detail: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first."""
        if self.ttft_s is None or self.e2e_s is None or not self.output_tokens or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


def bad_requests(model: str) -> tuple[tuple[bytes, str], ...]:
    """(body, content type) of requests that no server may accept; each must be answered 4xx and hurt nobody else."""
    good = {"model": model, "prompt": "hello", "max_tokens": 4}

    def changed(**fields: Any) -> tuple[bytes, str]:
        return msgspec.json.encode(good | fields), "application/json"

    return (
        (b'{"model": "x", "prompt": "cut', "application/json"),
        (b"", "application/json"),
        (b"\xff\xfe{}", "application/json"),
        changed(n=0),
        changed(n=10**9),
        changed(max_tokens=-1),
        changed(max_tokens=2**63 - 1),
        changed(temperature="NaN"),
        changed(temperature=-1),
        changed(top_p=0),
        changed(prompt=[]),
        changed(prompt=[-1]),
        changed(prompt=[2**31 - 1]),
        changed(logprobs=10**6),
        changed(stop=["x"] * 10**4),
        changed(logit_bias={"-1": 0}),
        changed(model="no/such/model"),
        changed(seed=-(2**70)),
        (b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}", "application/json"),
        (msgspec.json.encode(good), "text/plain"),
    )


class Target:
    """A server and how to speak to it. Owns its connection pool."""

    def __init__(self, url: str, model: str, *, chat: bool, api_key: str | None, timeout_s: float, extra: dict[str, Any] | None = None):
        """`extra`: fields added to every request body, e.g. {"ignore_eos": true}."""
        self.model = model
        self._chat = chat
        self._extra = extra or {}
        self._bad = bad_requests(model)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self._http = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout_s, limits=limits, trust_env=False)

    @property
    def http(self) -> httpx.AsyncClient:
        return self._http

    async def close(self) -> None:
        await self._http.aclose()

    async def send(self, planned: Planned, prompt: str | list[int], started_s: float) -> Sample:
        """Performs one planned request; `started_s` is the run's start on the perf_counter clock."""
        begun_s = time.perf_counter()
        sample = Sample(
            index=planned.index,
            sent_at_s=begun_s - started_s,
            outcome="broken",
            planned_bad=planned.bad is not None,
            planned_vanish=planned.vanish is not None,
        )
        body, content_type = self._body(planned, prompt)
        try:
            await self._exchange(planned, body, content_type, sample, begun_s)
        except _Left:
            sample.outcome = "vanished"
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            sample.detail = type(error).__name__
        sample.e2e_s = sample.e2e_s or time.perf_counter() - begun_s
        return sample

    def _body(self, planned: Planned, prompt: str | list[int]) -> tuple[bytes, str]:
        if planned.bad is not None:
            return self._bad[planned.bad]
        asked = {"messages": [{"role": "user", "content": prompt}]} if self._chat else {"prompt": prompt}
        fixed = {
            "model": self.model,
            "max_tokens": planned.lengths.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return msgspec.json.encode(asked | fixed | self._extra), "application/json"

    async def _exchange(self, planned: Planned, body: bytes, content_type: str, sample: Sample, begun_s: float) -> None:
        headers = {"Content-Type": content_type, "Content-Length": str(len(body))}
        content = _cut_body(body) if planned.vanish == "body" else body
        path = "/v1/chat/completions" if self._chat else "/v1/completions"
        request = self._http.build_request("POST", path, content=content, headers=headers)
        if planned.vanish == "queued":
            request.extensions["timeout"] = dict.fromkeys(("connect", "write", "pool"), 10.0) | {"read": 0.001}
        try:
            reply = await self._http.send(request, stream=True)
        except httpx.ReadTimeout:
            if planned.vanish == "queued":
                raise _Left from None
            raise
        try:
            sample.status = reply.status_code
            if reply.status_code != 200:
                await _read_refusal(reply, sample)
                return
            if planned.vanish == "queued":
                raise _Left
            await self._read_stream(reply, planned, sample, begun_s)
        finally:
            await reply.aclose()

    async def _read_stream(self, reply: httpx.Response, planned: Planned, sample: Sample, begun_s: float) -> None:
        last_s, pieces, finished = 0.0, 0, False
        async for line in reply.aiter_lines():
            if not line.startswith("data:"):
                continue
            now_s = time.perf_counter() - begun_s
            payload = line[5:].strip()
            if payload == "[DONE]":
                sample.e2e_s, sample.outcome = last_s or now_s, "ok" if finished else "broken"
                sample.detail = "" if finished else "no finish_reason"
                return
            event = msgspec.json.decode(payload, type=_Event)
            if event.error is not None:
                sample.outcome, sample.detail = "failed", str(event.error)[:200]
                return
            if event.usage is not None:
                sample.prompt_tokens, sample.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
            for choice in event.choices:
                finished |= choice.finish_reason is not None
                if not choice.text and not (choice.delta and choice.delta.content):
                    continue
                pieces += 1
                if sample.ttft_s is None:
                    sample.ttft_s = now_s
                else:
                    sample.gaps_s.append(now_s - last_s)
                last_s = now_s
                if planned.vanish == "stream" and pieces >= planned.vanish_after:
                    raise _Left
        sample.detail = "stream ended without [DONE]"


class _Left(Exception):
    """This client leaves, as its plan says."""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


async def _cut_body(body: bytes) -> AsyncIterator[bytes]:
    yield body[: max(1, len(body) // 2)]
    raise _Left


async def _read_refusal(reply: httpx.Response, sample: Sample) -> None:
    text = (await reply.aread())[:300].decode(errors="replace")
    status = reply.status_code
    sample.outcome = "shed" if status in (429, 503) else "refused" if status < 500 else "failed"
    sample.retry_after = reply.headers.get("retry-after")
    sample.detail = text
