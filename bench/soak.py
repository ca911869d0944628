"""Soak: a real trace with misbehaving clients against a server of its own, then ten times the rate, then the question what leaked.

Phases: warm up and calibrate (closed loop); the trace at a share of the measured capacity, with clients that vanish and
malformed requests; the same at --overload times that rate, which may only shed; a few good requests again. Before and after
each, when the server is idle, its pages, requests, memory, file descriptors, threads and compilations are read from outside.

Examples:
  python -m bench.soak --model=checkpoints/nova-small --trace=AzureLLMInferenceTrace_conv.csv --out=/tmp/soak
  python -m bench.soak --model=DIR --trace=TRACE.csv --requests=200 --overload_requests=100 --server_flags="--max_rows=8 --max_waiting=32"

Exit code: 0 when every check holds, 3 when one does not, 1 when the server did not start.
"""

import asyncio
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
from absl import app, flags

from bench import common
from bench.client import Sample, Target, bad_requests
from bench.figures import Figures, Slo, figures, figures_table, plot
from bench.replay import replay_closed, replay_open
from bench.served import Gauges, ServedModel, Weight
from bench.serving import discover_model, measure_tokens_per_word
from bench.traffic import Lengths, Planned, Prompts, make_plan, read_trace, scale_lengths

FLAGS = flags.FLAGS

_IDLE_S = 60.0
_REST_S = 3.0
"""An idle server gives memory back after a moment (`core.heap`)."""
_CONTEXT_MARGIN = 0.9
"""Word prompts are only about as long as planned."""
_SPARE_FILES = 8
"""Sockets that may still be in TIME_WAIT or kept alive when files are counted."""
_SPARE_THREADS = 48
"""The front end's pool for tokenizing starts its threads (40 at most) when many requests come at once, and keeps them."""
_CANARY_TOKENS = 24


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    flags.adopt_module_key_flags(common)
    flags.DEFINE_string("model", None, "what the server is given as --model", required=True)
    flags.DEFINE_string("trace", None, "CSV with TIMESTAMP,ContextTokens,GeneratedTokens", required=True)
    flags.DEFINE_integer("requests", 2000, "requests of the trace phase", lower_bound=1)
    flags.DEFINE_integer("warmup_requests", 200, "requests of the warm-up, misbehaviour included", lower_bound=20)
    flags.DEFINE_integer("overload_requests", 1000, "requests of the overload phase", lower_bound=0)
    flags.DEFINE_float("vanish_share", 0.2, "share of clients that leave early", lower_bound=0, upper_bound=1)
    flags.DEFINE_float("bad_share", 0.05, "share of malformed requests", lower_bound=0, upper_bound=1)
    flags.DEFINE_float("load", 0.6, "rate of the trace phase as a share of the measured capacity", lower_bound=0.01)
    flags.DEFINE_float("overload", 10.0, "rate of the overload phase, as a multiple of the trace phase's", lower_bound=1)
    flags.DEFINE_integer("concurrency", 16, "clients of the warm-up", lower_bound=1)
    flags.DEFINE_integer("context", None, "tokens the longest request may have; the server's own if not given")
    flags.DEFINE_float("complete_share", 0.95, "share of good requests that must complete")
    flags.DEFINE_integer("growth_mib", 32, "most resident memory that may be gained after the warm-up")
    flags.DEFINE_string("server_flags", "", "more flags for the server, separated by blanks")
    flags.DEFINE_integer("seed", 0, "of prompts and misbehaviour")


class Check(msgspec.Struct, frozen=True):
    name: str
    holds: bool
    detail: str


class Moment(msgspec.Struct, frozen=True):
    """An idle server."""

    after: str
    weight: Weight
    gauges: Gauges


class Soak:
    """The phases, in order, on one running server."""

    def __init__(self, server: ServedModel, target: Target, prompts: Prompts, times_s: Sequence[float], lengths: Sequence[Lengths]):
        self._server, self._target, self._prompts = server, target, prompts
        self._times_s, self._lengths = times_s, lengths
        self.moments: list[Moment] = []
        self.phases: dict[str, Figures] = {}
        self.samples: dict[str, list[Sample]] = {}
        self.canaries: list[str] = []
        self.rate_per_s = 0.0

    async def run(self) -> None:
        warm = self._plan([0.0] * FLAGS.warmup_requests, seed=-1)
        await self._keep("warm-up", replay_closed(self._target, warm, self._prompts, concurrency=FLAGS.concurrency))
        span_s = self._times_s[-1] - self._times_s[0]
        capacity_per_s = self.phases["warm-up"].requests_per_s / max(1e-9, 1 - FLAGS.vanish_share - FLAGS.bad_share)
        self.rate_per_s = FLAGS.load * capacity_per_s
        factor = self.rate_per_s * span_s / max(1, len(self._times_s) - 1)
        common.say(
            f"capacity {capacity_per_s:.2f} requests/s; the trace is replayed {factor:.2f} times as fast, {self.rate_per_s:.2f} requests/s"
        )
        plan = self._plan([time_s / factor for time_s in self._times_s], seed=FLAGS.seed)
        await self._keep("trace", replay_open(self._target, plan, self._prompts, max_open=len(plan)))
        if FLAGS.overload_requests:
            times_s = [time_s / factor / FLAGS.overload for time_s in self._times_s[: FLAGS.overload_requests]]
            plan = self._plan(times_s, seed=FLAGS.seed + 1)
            await self._keep("overload", replay_open(self._target, plan, self._prompts, max_open=len(plan)))
        good = [Planned(index=i, at_s=0.0, lengths=item) for i, item in enumerate(self._lengths[:20])]
        await self._keep("recovery", replay_closed(self._target, good, self._prompts, concurrency=4))

    def _plan(self, times_s: Sequence[float], *, seed: int) -> list[Planned]:
        return make_plan(
            times_s,
            self._lengths,
            vanish_share=FLAGS.vanish_share,
            bad_share=FLAGS.bad_share,
            bad_kinds=len(bad_requests("")),
            seed=seed,
        )

    async def _keep(self, name: str, phase: Any) -> None:
        samples = await phase
        self.samples[name], self.phases[name] = samples, figures(samples, Slo())
        gauges = await asyncio.to_thread(self._server.wait_idle, _IDLE_S)
        self.canaries.append(await self._canary())
        await asyncio.sleep(_REST_S)
        self.moments.append(Moment(name, self._server.weigh(), gauges))
        common.say(f"\n{name}: {figures_table(self.phases[name])}\n{self.moments[-1].weight}")

    async def _canary(self) -> str:
        """The same greedy request each time: its answer must not change."""
        body = {"model": self._target.model, "prompt": "Once upon a time", "max_tokens": _CANARY_TOKENS, "temperature": 0}
        reply = await self._target.http.post("/v1/completions", json=body)
        return reply.json()["choices"][0]["text"] if reply.status_code == 200 else f"status {reply.status_code}"


def checks(soak: Soak) -> list[Check]:
    """What the run must show."""
    found: list[Check] = []

    def check(name: str, holds: bool, detail: object) -> None:
        found.append(Check(name, holds, str(detail)))

    trace = soak.phases["trace"]
    share = trace.completed / max(1, trace.good)
    check(
        f"{FLAGS.complete_share:.0%} of good requests complete",
        share >= FLAGS.complete_share,
        f"{trace.completed} of {trace.good}, {share:.2%}",
    )
    every = [sample for samples in soak.samples.values() for sample in samples]
    odd = [sample for sample in every if sample.outcome in ("failed", "broken") and not sample.planned_vanish]
    check("no 5xx but 503, no broken stream", not odd, [(sample.index, sample.status, sample.detail[:80]) for sample in odd[:5]])
    bad = [sample for sample in every if sample.planned_bad]
    wrong = [sample for sample in bad if sample.outcome not in ("refused", "shed", "unsent")]
    check("every malformed request is refused", not wrong, f"{len(bad)} sent, {[(s.index, s.status) for s in wrong[:5]]}")
    sheds = [sample for sample in every if sample.outcome == "shed"]
    silent = [sample for sample in sheds if not (sample.retry_after or "").isdigit()]
    check("every shed request is told when to retry", not silent, f"{len(sheds)} shed, {len(silent)} without Retry-After")
    if "overload" in soak.phases:
        check("overload sheds", bool(soak.phases["overload"].outcomes.get("shed")), soak.phases["overload"].outcomes)
    recovery = soak.phases["recovery"]
    check("it recovers", recovery.completed == recovery.good == recovery.sent, recovery.outcomes)
    check("the canary never changes", len(set(soak.canaries)) == 1 and not soak.canaries[0].startswith("status"), soak.canaries[:1])
    found += _leaks(soak.moments)
    return found


def _leaks(moments: Sequence[Moment]) -> list[Check]:
    first, last = moments[0], moments[-1]
    totals = {sum(moment.gauges.pages.values()) for moment in moments}
    grown_bytes = max(moment.weight.total_bytes for moment in moments[1:]) - first.weight.total_bytes
    files = last.weight.files - first.weight.files
    threads = last.weight.threads - first.weight.threads
    busy = [(moment.after, moment.gauges) for moment in moments if not moment.gauges.idle]
    compiled = [moment.gauges.compilations for moment in moments]
    violations = last.gauges.identity_violations
    return [
        Check("idle after every phase: nothing runs, waits or holds pages", not busy, str(busy)),
        Check("free + cached + held pages stay the same", len(totals) == 1 and violations == 0, f"{totals}, {violations:.0f} violations"),
        Check("no compilation after ready", not any(compiled), str(compiled)),
        Check(f"memory grows {FLAGS.growth_mib} MiB at most", grown_bytes <= FLAGS.growth_mib << 20, f"{grown_bytes / 2**20:.1f} MiB"),
        Check("no file descriptor leaks", files <= _SPARE_FILES, f"{files:+d}"),
        Check("no thread leaks", threads <= _SPARE_THREADS, f"{threads:+d}"),
    ]


async def _soak(server: ServedModel) -> tuple[Soak, dict[str, Any]]:
    async with httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False) as http:
        model, told = await discover_model(http, None)
        tokens_per_word = await measure_tokens_per_word(http, model) or 1.0
    context = FLAGS.context or told or 2048
    times_s, lengths = read_trace(Path(FLAGS.trace))
    times_s, lengths = times_s[: FLAGS.requests], scale_lengths(lengths[: FLAGS.requests], math.floor(_CONTEXT_MARGIN * context))
    prompts = Prompts(seed=FLAGS.seed, vocab=None, tokens_per_word=tokens_per_word)
    target = Target(server.url, model, chat=False, api_key=None, timeout_s=600, extra={"ignore_eos": True})
    soak = Soak(server, target, prompts, times_s, lengths)
    try:
        await soak.run()
    finally:
        await target.close()
    facts = {"model": model, "context_tokens": context, "tokens_per_word": tokens_per_word, "rate_per_s": soak.rate_per_s}
    return soak, facts


def main(_: list[str]) -> int:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it writes a line for each request
    machine = common.describe_machine(probe=common.PROBE.value)
    try:
        with ServedModel(FLAGS.model, FLAGS.server_flags.split()) as server:
            common.say(f"ready: {server.ready}")
            soak, facts = asyncio.run(_soak(server))
            ready = server.ready
    except (RuntimeError, httpx.HTTPError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    results = checks(soak)
    report = {
        "benchmark": "soak",
        "machine": msgspec.to_builtins(machine),
        "settings": common.settings(__name__) | facts,
        "startup": ready,
        "phases": msgspec.to_builtins(soak.phases),
        "moments": msgspec.to_builtins(soak.moments),
        "checks": msgspec.to_builtins(results),
    }
    rows = [["yes" if result.holds else "NO", result.name, result.detail[:160]] for result in results]
    phases = "\n\n".join(f"### {name}\n\n{figures_table(result)}" for name, result in soak.phases.items())
    common.publish(report, f"{common.machine_line(machine)}\n\n{common.markdown_table(['holds', 'check', 'measured'], rows)}\n\n{phases}")
    if common.OUT.value:
        plot(soak.samples["trace"], Path(common.OUT.value + ".png"), f"soak, {facts['model']}: trace phase")
    return 0 if all(result.holds for result in results) else 3


if __name__ == "__main__":
    define_flags()
    app.run(main)
