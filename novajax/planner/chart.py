"""The bounds from 1 to 64 nodes as a picture: throughput above, latency below. Needs matplotlib (extra `plan`)."""

from pathlib import Path

from novajax.core.errors import ConfigError
from novajax.planner.plan import Plan


def write_chart(plan: Plan, path: Path) -> None:
    """A PNG of `plan.scaling`. Raises ConfigError without matplotlib, for a path that cannot be written, or when nothing fits."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a chart needs matplotlib: install novajax[plan]", param="png") from None
    shown = [one for one in plan.scaling if not one.refused]
    if not shown:
        raise ConfigError("no number of nodes up to 64 holds the model, so there is nothing to draw", param="png")
    nodes = [one.nodes for one in shown]
    figure = Figure(figsize=(8, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(nodes, [one.total_tokens_per_s for one in shown], marker="o", label="bound: everything overlaps")
    above.plot(nodes, [one.total_serial_tokens_per_s for one in shown], marker="s", label="nothing overlaps, full rates")
    above.plot(
        nodes, [shown[0].total_tokens_per_s * n / nodes[0] for n in nodes], linestyle=":", color="grey", label="linear from the smallest"
    )
    below.plot(nodes, [one.token_s * 1e3 for one in shown], marker="o", label="between tokens of a stream, all rows")
    below.plot(nodes, [one.ttft_s * 1e3 for one in shown], marker="s", label=f"first token of {plan.config.prompt_tokens:,} prompt tokens")
    for axes, what in ((above, "output tokens/s"), (below, "milliseconds, lower bound")):
        axes.set_xscale("log", base=2)
        axes.set_ylabel(what)
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    above.set_yscale("log")
    below.set_ylim(bottom=0)
    below.set_xticks(nodes, [str(n) for n in nodes])
    below.set_xlabel(f"nodes of {plan.cluster.gpus_per_host} {plan.cluster.chip.name}")
    figure.suptitle(f"{plan.model}, {plan.chosen.profile}: best layouts by bounds, not measurements")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", param="png") from None
