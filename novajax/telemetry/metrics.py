"""What Prometheus reads: one registry of one front end, names with vLLM's stems under the prefix `novajax_`.

Fronts report what they see of each request; the engine's own numbers come from `Stats` when somebody scrapes. Counters never
go backwards: an engine that restarts counts from zero again, and its counts are added to what the last one reached. Label
values come from fixed sets (finish reasons, error kinds), never from requests. It knows no HTTP.
"""

import asyncio
from collections.abc import Iterator
from typing import NoReturn, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from novajax.core.clock import Clock
from novajax.core.types import FinishReason, Stats, Timing, Usage

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"

_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
_LONG_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600, 1800)
_LAG_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

_COUNTED = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens whose KV was computed or found in the cache"),
    "generation_tokens": ("generation_tokens", "Tokens generated"),
    "drafted_tokens": ("speculation_drafted_tokens", "Guesses of next tokens that were checked"),
    "accepted_tokens": ("speculation_accepted_tokens", "Guesses of next tokens that were right"),
    "prefix_query_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_hit_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "preemptions": ("num_preemptions", "Sequences that gave up their pages and were recomputed"),
    "compilations_after_ready": ("xla_compilations", "XLA compilations after the server said ready; should stay 0"),
    "identity_violations": ("kv_pool_identity_violations", "Times that free + cached + held pages were not all pages; should stay 0"),
    "steps": ("engine_steps", "Steps of the engine"),
}
"""Field of Stats -> (counter, help)."""
_ABORTED = {"aborted_queued": "queued", "aborted_prefill": "prefill", "aborted_decode": "decode"}
"""Field of Stats -> how far an aborted sequence was."""


class Metrics:
    """See the module docstring. Used on one event loop; `render` may run in any thread."""

    def __init__(self, model_name: str):
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._last = dict.fromkeys((*_COUNTED, *_ABORTED), 0)
        self._last_pid: int | None = None

        self._counters = {field: self._counter(name, text).labels(model_name) for field, (name, text) in _COUNTED.items()}
        aborted = self._counter("requests_aborted", "Sequences whose client left, by how far they were", "phase")
        self._counters |= {field: aborted.labels(model_name, phase) for field, phase in _ABORTED.items()}
        self._running = self._gauge("num_requests_running", "Sequences in the running batch")
        self._waiting = self._gauge("num_requests_waiting", "Sequences waiting for a place")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV pages held by running sequences; 1 is all")
        self._kv_blocks = self._gauge("kv_blocks", "KV pages by state", "state", "tier")
        self._restarts = self._counter("engine_restarts", "Starts of the engine's processes after a fault", "reason")
        self._restarted: dict[str, int] = {}
        self._recovery = self._gauge("recovery_seconds", "From the detection of the last fault to serving again")
        self._host_step = self._gauge("host_step_seconds", "Median host time of the last steps")
        self._phases = self._gauge("step_phase_seconds", "Median time of the last steps by phase; all but device are the host's", "phase")
        self._device_busy = self._gauge("device_busy_ratio", "Share of wall time in which the device worked")

        self._scored = self._gauge("quality_scored_answers", "Answers scored again by a more precise engine")
        self._score = self._gauge("quality_score", "exp(-KL) of those answers; 1 is no loss; absent while unmeasured")
        self._kl = self._gauge("quality_kl_nats", "KL(precise || served) per token, a lower bound")
        self._agreement = self._gauge("quality_top1_agreement_ratio", "Tokens at which both find the same one likeliest")
        self._alert = self._gauge("quality_alert", "1 while the KL is beyond its bound")

        self._first_token = self._histogram("time_to_first_token_seconds", "From the request to its first token", _SHORT_S)
        self._per_token = self._histogram("request_time_per_output_token_seconds", "Mean time between the tokens of a request", _SHORT_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From the request to its last token", _LONG_S)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting for a place in the batch", _SHORT_S)
        self._prefill = self._histogram("request_prefill_time_seconds", "Computing the prompt", _SHORT_S)
        self._prompt_size = self._histogram("request_prompt_tokens", "Prompt lengths", _TOKENS)
        self._output_size = self._histogram("request_generation_tokens", "Output lengths", _TOKENS)
        self._lag = self._histogram("event_loop_lag_seconds", "How late the front end's event loop woke up", _LAG_S)
        self._success = self._counter("request_success", "Sequences that ended, by reason", "finished_reason")
        self._rejected = self._counter("requests_rejected", "Requests refused, by kind of error", "reason")
        for reason in get_args(FinishReason):
            self._success.labels(model_name, reason)

    def first_token(self, after_s: float) -> None:
        """A request's first token left, after_s seconds after the request came."""
        self._first_token.labels(self._model_name).observe(after_s)

    def finished(self, reason: FinishReason, usage: Usage, timing: Timing | None, e2e_s: float) -> None:
        """A sequence ended, e2e_s seconds after its request came. Without timing only what is known is counted."""
        self._success.labels(self._model_name, reason).inc()
        self._e2e.labels(self._model_name).observe(e2e_s)
        self._prompt_size.labels(self._model_name).observe(usage.prompt_tokens)
        self._output_size.labels(self._model_name).observe(usage.completion_tokens)
        if timing is None:
            return
        self._queue.labels(self._model_name).observe(timing.queued_s)
        if timing.prefill_s is not None:
            self._prefill.labels(self._model_name).observe(timing.prefill_s)
        if timing.decode_s is not None and usage.completion_tokens > 1:
            self._per_token.labels(self._model_name).observe(timing.decode_s / (usage.completion_tokens - 1))

    def rejected(self, reason: str) -> None:
        """A request was refused; `reason` is the `kind` of its NovaError."""
        self._rejected.labels(self._model_name, reason).inc()

    def loop_lag(self, lag_s: float) -> None:
        """The event loop woke up lag_s later than it was asked to."""
        self._lag.labels(self._model_name).observe(lag_s)

    async def watch_loop(self, clock: Clock, every_s: float = 0.25) -> NoReturn:
        """Measures the event loop's lag until cancelled."""
        while True:
            before_s = clock.now_s()
            await asyncio.sleep(every_s)
            self.loop_lag(max(0.0, clock.now_s() - before_s - every_s))

    def absorb(self, stats: Stats) -> None:
        """The engine's state now; call it before `render`."""
        if stats.pid is not None or self._last_pid is None:  # no pid any more: nobody is there to count
            self._count(stats)
        self._running.labels(self._model_name).set(stats.requests_running)
        self._waiting.labels(self._model_name).set(stats.requests_waiting)
        self._kv_usage.labels(self._model_name).set(stats.kv_pages_held / stats.kv_pages_total if stats.kv_pages_total else 0.0)
        for state, pages in (("free", stats.kv_pages_free), ("cached", stats.kv_pages_cached), ("held", stats.kv_pages_held)):
            self._kv_blocks.labels(self._model_name, state, "device").set(pages)
        for reason, count in stats.restarts.items():  # a supervisor that is replaced counts from zero again
            last = self._restarted.get(reason, 0)
            self._restarts.labels(self._model_name, reason).inc(count if count < last else count - last)
            self._restarted[reason] = count
        quality = stats.quality
        measured = (
            (self._host_step, stats.host_step_s),
            (self._device_busy, stats.device_busy),
            (self._recovery, stats.recovery_s),
            (self._scored, quality and quality.scored),
            (self._score, quality and quality.score),
            (self._kl, quality and quality.kl),
            (self._agreement, quality and quality.top1_agreement),
            (self._alert, quality and float(quality.alert)),
        )
        for phase, seconds in stats.step_phases_s.items():
            self._phases.labels(self._model_name, phase).set(seconds)
        for gauge, value in measured:
            if value is None:
                gauge.clear()  # unmeasured is absent, not zero
            else:
                gauge.labels(self._model_name).set(value)

    def render(self) -> bytes:
        """The exposition text of CONTENT_TYPE."""
        return generate_latest(_WithoutBirthdays(self._registry))

    def _count(self, stats: Stats) -> None:
        restarted = stats.pid != self._last_pid
        self._last_pid = stats.pid
        for field, counter in self._counters.items():
            now, last = getattr(stats, field), self._last[field]
            counter.inc(now if restarted or now < last else now - last)
            self._last[field] = now

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(f"novajax_{name}", text, ("model_name", *labels), registry=self._registry)
        if not labels:
            counter.labels(self._model_name)
        return counter

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"novajax_{name}", text, ("model_name", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"novajax_{name}", text, ("model_name",), registry=self._registry, buckets=buckets)
        histogram.labels(self._model_name)
        return histogram


class _WithoutBirthdays(CollectorRegistry):
    """A view of a registry without the `_created` series, which double its length and say nothing here."""

    def __init__(self, registry: CollectorRegistry):
        super().__init__()
        self._whole = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._whole.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
