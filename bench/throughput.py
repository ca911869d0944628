"""Offline throughput of one engine in process: a pile of requests, the engine kept full, tokens and requests per second.

Lengths are fixed (--prompt_tokens, --output_tokens) or those of a trace, scaled by one factor so that the longest fits.
Each of --repetitions runs the same lengths with fresh random prompts after one small uncounted run.

Examples:
  python -m bench.throughput --model=checkpoints/nova-small --requests=64 --concurrency=16
  python -m bench.throughput --model=DIR --trace=AzureLLMInferenceTrace_conv.csv --requests=200 --json
"""

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from absl import app, flags

from bench import common, engines
from bench.drive import Timed, decode_tokens_per_s, random_requests, run, total_output_tokens_per_s
from bench.traffic import Lengths, read_trace, scale_lengths
from novajax.core.backend import Backend

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    engines.define_flags()
    flags.adopt_module_key_flags(common)
    flags.adopt_module_key_flags(engines.options)
    flags.DEFINE_integer("requests", 64, "how many requests in one repetition", lower_bound=1, upper_bound=1_000_000)
    flags.DEFINE_integer("concurrency", 16, "most requests at once", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 128, "prompt length without a trace", lower_bound=1)
    flags.DEFINE_integer("output_tokens", 128, "answer length without a trace", lower_bound=1)
    flags.DEFINE_string("trace", None, "CSV with ContextTokens,GeneratedTokens to take lengths from")
    flags.DEFINE_integer("repetitions", 3, "counted runs", lower_bound=1)


class Repetition(msgspec.Struct, frozen=True, kw_only=True):
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    """Tokens after the first of each sequence, over the time from the first token of all to the last."""
    ttft_p50_s: float
    """Includes waiting in the pile."""


async def measure(backend: Backend, lengths: Sequence[Lengths], *, concurrency: int, repetitions: int) -> list[Repetition]:
    card = await backend.card()
    warm = [Lengths(min(item.prompt_tokens, 32), min(item.output_tokens, 4)) for item in lengths[:concurrency]]
    await run(backend, random_requests(card, warm, seed=-1), concurrency=concurrency)
    done = []
    for seed in range(repetitions):
        timed = await run(backend, random_requests(card, lengths, seed=seed), concurrency=concurrency)
        done.append(_repetition(timed))
        common.say(f"run {seed + 1}/{repetitions}: {done[-1].output_tokens_per_s:.1f} output tokens/s")
    return done


def _repetition(timed: Sequence[Timed]) -> Repetition:
    duration_s = max(item.last_s for item in timed) - min(item.sent_s for item in timed)
    return Repetition(
        duration_s=duration_s,
        requests_per_s=len(timed) / duration_s,
        output_tokens_per_s=total_output_tokens_per_s(timed),
        prompt_tokens_per_s=sum(item.prompt_tokens for item in timed) / duration_s,
        decode_tokens_per_s=decode_tokens_per_s(timed),
        ttft_p50_s=statistics.median(item.first_s - item.sent_s for item in timed),
    )


def table(repetitions: Sequence[Repetition]) -> str:
    rows: list[list[Any]] = []
    for field in Repetition.__struct_fields__:
        values = [getattr(item, field) for item in repetitions]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append([field, statistics.median(values), statistics.fmean(values), sd])
    return common.markdown_table(["figure", "median", "mean", "sd"], rows)


async def _measured(machine: common.Machine) -> tuple[dict[str, Any], str]:
    backend = engines.open_backend()
    try:
        card = await backend.card()
        lengths = [Lengths(FLAGS.prompt_tokens, FLAGS.output_tokens)] * FLAGS.requests
        if FLAGS.trace:
            _, traced = read_trace(Path(FLAGS.trace))
            lengths = scale_lengths(traced[: FLAGS.requests], card.max_request_tokens)
        done = await measure(backend, lengths, concurrency=FLAGS.concurrency, repetitions=FLAGS.repetitions)
        stats = await backend.stats()
    finally:
        await backend.close()
    report = {
        "benchmark": "throughput",
        "machine": msgspec.to_builtins(machine),
        "settings": common.settings(__name__) | engines.settings(),
        "model": msgspec.to_builtins(card),
        "results": msgspec.to_builtins(done),
        "stats": msgspec.to_builtins(stats),
    }
    headline = f"{card.id}: {len(lengths)} requests, {FLAGS.concurrency} at once, {len(done)} runs"
    return report, f"{common.machine_line(machine)}\n\n{headline}\n\n{table(done)}"


def main(_: list[str]) -> int:
    machine = common.describe_machine(probe=common.PROBE.value)
    try:
        report, markdown = asyncio.run(_measured(machine))
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error), exitcode=2) from error
    common.publish(report, markdown)
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
