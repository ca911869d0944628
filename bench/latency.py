"""Speed of one engine in process, as a table of tests: ppN reads N prompt tokens, tgN writes N tokens, at each batch size.

Each test runs --repetitions times with fresh random prompts (nothing hits the prefix cache) after one uncounted run, and is
reported as mean and standard deviation, and as the median, in tokens per second of the whole batch. HTTP and text take no
part; `bench.serving` measures those.

Examples:
  python -m bench.latency --model=checkpoints/nova-small
  python -m bench.latency --model=$(python -m bench.shapes --shape=135m) --prompt_tokens=128,512 --batch_sizes=1,4,16 --out=/tmp/latency
"""

import asyncio
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec
from absl import app, flags

from bench import common, engines
from bench.drive import decode_tokens_per_s, prefill_tokens_per_s, random_requests, run
from bench.traffic import Lengths
from novajax.core.backend import Backend

FLAGS = flags.FLAGS

_TG_PROMPT_TOKENS = 8


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    engines.define_flags()
    flags.adopt_module_key_flags(common)
    flags.adopt_module_key_flags(engines.options)
    flags.DEFINE_list("prompt_tokens", ["512"], "lengths of the pp tests")
    flags.DEFINE_list("output_tokens", ["128"], "lengths of the tg tests")
    flags.DEFINE_list("batch_sizes", ["1", "16"], "sequences at once")
    flags.DEFINE_integer("repetitions", 5, "counted runs of each test", lower_bound=1)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One test at one batch size; rates are tokens per second over the whole batch."""

    test: str
    batch: int
    tokens_per_s: list[float]
    """One per repetition."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.tokens_per_s)

    @property
    def sd(self) -> float:
        return statistics.stdev(self.tokens_per_s) if len(self.tokens_per_s) > 1 else 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_s)


async def measure(
    backend: Backend, *, prompt_tokens: Sequence[int], output_tokens: Sequence[int], batch_sizes: Sequence[int], repetitions: int
) -> list[Row]:
    """Every test at every batch size, one uncounted run before each."""
    rows, seed = [], 0
    tests = [(f"pp{n}", Lengths(n, 1), prefill_tokens_per_s) for n in prompt_tokens]
    tests += [(f"tg{n}", Lengths(_TG_PROMPT_TOKENS, n), decode_tokens_per_s) for n in output_tokens]
    card = await backend.card()
    for name, lengths, rate in tests:
        for batch in batch_sizes:
            rates = []
            for _ in range(repetitions + 1):
                seed += 1
                timed = await run(backend, random_requests(card, [lengths] * batch, seed=seed), concurrency=batch)
                rates.append(rate(timed))
            rows.append(Row(test=name, batch=batch, tokens_per_s=rates[1:]))
            common.say(f"{name} x {batch}: {rows[-1].median:.1f} tokens/s")
    return rows


def table(model: str, rows: Sequence[Row]) -> str:
    def step_ms(row: Row) -> float | None:
        return 1e3 * row.batch / row.median if row.test.startswith("tg") else None

    body: list[list[Any]] = [[model, row.test, row.batch, f"{row.mean:.2f} ± {row.sd:.2f}", row.median, step_ms(row)] for row in rows]
    return common.markdown_table(["model", "test", "batch", "tokens/s", "median", "ms a step"], body)


async def _measured(machine: common.Machine) -> tuple[dict[str, Any], str]:
    backend = engines.open_backend()
    try:
        card = await backend.card()
        rows = await measure(
            backend,
            prompt_tokens=_numbers("prompt_tokens"),
            output_tokens=_numbers("output_tokens"),
            batch_sizes=_numbers("batch_sizes"),
            repetitions=FLAGS.repetitions,
        )
        stats = await backend.stats()
    finally:
        await backend.close()
    settings = common.settings(__name__) | engines.settings()
    report = {
        "benchmark": "latency",
        "machine": msgspec.to_builtins(machine),
        "settings": settings,
        "model": msgspec.to_builtins(card),
        "results": [msgspec.to_builtins(row) | {"mean": row.mean, "sd": row.sd, "median": row.median} for row in rows],
        "stats": msgspec.to_builtins(stats),
    }
    return report, f"{common.machine_line(machine)}\n\n{table(card.id, rows)}"


def _numbers(flag: str) -> list[int]:
    try:
        numbers = [int(text) for text in FLAGS[flag].value or []]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise app.UsageError(f"--{flag} must be a list of positive numbers", exitcode=2)
    return numbers


def main(_: list[str]) -> int:
    machine = common.describe_machine(probe=common.PROBE.value)
    report, markdown = asyncio.run(_measured(machine))
    common.publish(report, markdown)
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
