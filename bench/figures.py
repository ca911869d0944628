"""The figures of a load run: outcomes, latencies, rates and goodput from its samples; as a table and as a plot.

"Good" requests are those that were neither malformed nor sent by a client that leaves: only they count for completion,
latency and goodput. Tokens of the others still count as work the server did, where it reported them.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.client import Sample
from bench.common import Summary, markdown_table, summarize


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """Service levels a request must meet to count for goodput; None: no such level."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def met(self, sample: Sample) -> bool:
        pairs = ((sample.ttft_s, self.ttft_s), (sample.tpot_s, self.tpot_s), (sample.e2e_s, self.e2e_s))
        return sample.outcome == "ok" and all(level is None or value is None or value <= level for value, level in pairs)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a run is reported by. Times in seconds."""

    duration_s: float
    sent: int
    good: int
    """Requests that a healthy server must answer."""
    completed: int
    """Good requests that got a whole answer."""
    outcomes: dict[str, int]
    statuses: dict[str, int]
    ttft_s: Summary
    tpot_s: Summary
    gap_s: Summary
    """Between pieces of an answer, all requests together (inter-token latency)."""
    e2e_s: Summary
    late_s: Summary
    """How late the generator itself was: if its p99 is not small, the generator was the bottleneck."""
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    goodput_per_s: float
    goodput_share: float | None
    """Of good requests."""


def figures(samples: Sequence[Sample], slo: Slo) -> Figures:
    sent = [sample for sample in samples if sample.outcome != "unsent"]
    good = [sample for sample in samples if not sample.planned_bad and not sample.planned_vanish]
    done = [sample for sample in good if sample.outcome == "ok"]
    duration_s = max((sample.sent_at_s + (sample.e2e_s or 0.0) for sample in sent), default=0.0)
    per_s = 1 / duration_s if duration_s else 0.0
    met = sum(slo.met(sample) for sample in good)
    return Figures(
        duration_s=duration_s,
        sent=len(sent),
        good=len(good),
        completed=len(done),
        outcomes=dict(Counter(sample.outcome for sample in samples).most_common()),
        statuses={str(status): count for status, count in Counter(sample.status for sample in sent).most_common()},
        ttft_s=summarize(sample.ttft_s for sample in done if sample.ttft_s is not None),
        tpot_s=summarize(sample.tpot_s for sample in done if sample.tpot_s is not None),
        gap_s=summarize(gap_s for sample in done for gap_s in sample.gaps_s),
        e2e_s=summarize(sample.e2e_s for sample in done if sample.e2e_s is not None),
        late_s=summarize(sample.late_s for sample in sent),
        requests_per_s=len(done) * per_s,
        output_tokens_per_s=sum(sample.output_tokens or 0 for sample in samples) * per_s,
        prompt_tokens_per_s=sum(sample.prompt_tokens or 0 for sample in samples) * per_s,
        goodput_per_s=met * per_s,
        goodput_share=met / len(good) if good else None,
    )


def figures_table(result: Figures) -> str:
    """Markdown: a line of counts, then latencies in milliseconds."""

    def row(name: str, summary: Summary) -> list[Any]:
        values = (summary.mean, summary.p50, summary.p90, summary.p99, summary.max)
        return [name, summary.count, *(None if value is None else value * 1e3 for value in values)]

    rows = [
        row("time to first token (ms)", result.ttft_s),
        row("time per output token (ms)", result.tpot_s),
        row("inter-token gap (ms)", result.gap_s),
        row("end to end (ms)", result.e2e_s),
        row("generator lateness (ms)", result.late_s),
    ]
    outcomes = ", ".join(f"{count} {name}" for name, count in result.outcomes.items())
    share = "-" if result.goodput_share is None else f"{result.goodput_share:.1%}"
    return "\n".join(
        [
            f"{result.completed} of {result.good} good requests completed in {result.duration_s:.1f} s ({outcomes}).",
            f"{result.requests_per_s:.2f} requests/s, {result.output_tokens_per_s:.1f} output tokens/s, "
            f"{result.prompt_tokens_per_s:.1f} prompt tokens/s, goodput {result.goodput_per_s:.2f} requests/s ({share}).",
            "",
            markdown_table(["metric", "n", "mean", "p50", "p90", "p99", "max"], rows),
        ]
    )


def plot(samples: Sequence[Sample], path: Path, title: str) -> None:
    """A PNG: latency distributions, and the run over time."""
    import matplotlib  # only a run that asks for a plot needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((ttft, gaps), (timeline, rate)) = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    done = [sample for sample in samples if sample.outcome == "ok"]
    _distribution(ttft, [s.ttft_s for s in done if s.ttft_s is not None], "time to first token (s)")
    _distribution(gaps, [gap for s in done for gap in s.gaps_s], "inter-token gap (s)")
    for outcome in sorted({sample.outcome for sample in samples}):
        points = [(s.sent_at_s, s.e2e_s or 0.0) for s in samples if s.outcome == outcome]
        timeline.scatter(*zip(*points, strict=True), s=6, label=f"{outcome} ({len(points)})")
    timeline.set(xlabel="sent at (s)", ylabel="end to end (s)")
    if samples:
        timeline.legend(fontsize="small")
    end_s = max((s.sent_at_s + (s.e2e_s or 0.0) for s in samples), default=1.0)
    edges = np.linspace(0, max(end_s, 1e-3), 61)
    tokens, _ = np.histogram([s.sent_at_s + (s.e2e_s or 0.0) for s in done], edges, weights=[s.output_tokens or 0 for s in done])
    rate.step(edges[:-1], tokens / (edges[1] - edges[0]), where="post", label="output tokens/s of requests ending then")
    flying = [sum(s.sent_at_s <= at < s.sent_at_s + (s.e2e_s or 0.0) for s in samples) for at in edges[:-1]]
    rate.step(edges[:-1], flying, where="post", label="requests in flight")
    rate.set(xlabel="time (s)", ylim=(0, None))
    rate.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _distribution(axes: Any, values: list[float], label: str) -> None:
    if values:
        ordered = np.sort(values)
        axes.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered))
        for quantile in (0.5, 0.9, 0.99):
            axes.axvline(float(np.quantile(ordered, quantile)), linestyle=":", linewidth=0.8, color="gray")
    axes.set(xlabel=label, ylabel="share of requests" if "first" in label else "share", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
