"""What guessing next tokens brings: the same requests through one engine that may guess and one that may not, in turn, in one process.

Three kinds of text, each at each load. `copying`: a passage said twice and begun again, answered greedily: much to look up. `free`: random
prompts drawn at temperature 1: next to nothing to look up, so what is left is what the guesses cost. `text`, with --text: pieces of a
file, continued greedily. Reported: tokens per second after the first of each answer, the ratio of medians, and the share of guesses that
were right. Answers must be equal.

Examples:
  python -m bench.speculation --model=checkpoints/nova-small --loads=1,4,16
  python -m bench.speculation --model=DIR --dtype=bfloat16 --loads=1 --output_tokens=128 --json
"""

import asyncio
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from absl import app, flags

from bench import common, engines
from bench.drive import decode_tokens_per_s, random_requests, run
from bench.traffic import Lengths
from novajax.core.backend import Backend
from novajax.core.types import ModelCard, Request, SamplingParams
from novajax.text.tokenizer import Tokenizer

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    engines.define_flags()
    flags.adopt_module_key_flags(common)
    flags.adopt_module_key_flags(engines.options)
    flags.DEFINE_list("loads", ["1", "4", "16"], "sequences at once")
    flags.DEFINE_integer("rounds", 5, "how often each engine runs each load, in turn", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 128, "prompt length", lower_bound=16)
    flags.DEFINE_integer("output_tokens", 128, "answer length", lower_bound=2)
    flags.DEFINE_string("text", None, "a file whose pieces are prompts too")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    load: int
    plain_tokens_per_s: float
    guessing_tokens_per_s: float
    ratio: float
    drafted: int
    accepted_share: float | None
    """None: there was no guess."""


def copying_requests(card: ModelCard, count: int, *, seed: int) -> list[Request]:
    """Prompts of a random passage, twice and a quarter."""
    draw = random.Random(seed)
    low = min(256, card.vocab_size // 2)
    requests = []
    for index in range(count):
        passage = [draw.randrange(low, card.vocab_size) for _ in range(FLAGS.prompt_tokens * 4 // 9)]
        prompt = tuple((passage * 3)[: FLAGS.prompt_tokens])
        sampling = SamplingParams(temperature=0.0, max_tokens=FLAGS.output_tokens, ignore_eos=True)
        requests.append(Request(id=f"copy-{seed}-{index}", prompt=prompt, sampling=sampling))
    return requests


def text_requests(card: ModelCard, count: int, *, seed: int) -> list[Request]:
    tokens = Tokenizer(Path(card.directory)).encode(Path(FLAGS.text).read_text("utf-8")[:200_000])
    sampling = SamplingParams(temperature=0.0, max_tokens=FLAGS.output_tokens, ignore_eos=True)
    starts = [random.Random(seed * 1000 + index).randrange(len(tokens) - FLAGS.prompt_tokens) for index in range(count)]
    return [
        Request(id=f"text-{seed}-{index}", prompt=tuple(tokens[at : at + FLAGS.prompt_tokens]), sampling=sampling)
        for index, at in enumerate(starts)
    ]


def free_requests(card: ModelCard, count: int, *, seed: int) -> list[Request]:
    return random_requests(card, [Lengths(FLAGS.prompt_tokens, FLAGS.output_tokens)] * count, seed=seed, temperature=1.0)


async def compare(plain: Backend, guessing: Backend, kind: str, load: int) -> Row:
    """Medians over the rounds; the first round of each is not counted."""
    make = {"copying": copying_requests, "free": free_requests, "text": text_requests}[kind]
    card = await plain.card()
    speeds: dict[str, list[float]] = {"plain": [], "guessing": []}
    before = await guessing.stats()
    for turn in range(FLAGS.rounds + 1):
        requests = make(card, load, seed=turn)
        for name, backend in (("plain", plain), ("guessing", guessing)):
            speed = decode_tokens_per_s(await run(backend, requests, concurrency=load))
            speeds[name] += [speed] if turn else []
        common.say(f"{kind}, {load} at once, round {turn} of {FLAGS.rounds}")
    after = await guessing.stats()
    drafted, accepted = after.drafted_tokens - before.drafted_tokens, after.accepted_tokens - before.accepted_tokens
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return Row(
        text=kind,
        load=load,
        plain_tokens_per_s=medians["plain"],
        guessing_tokens_per_s=medians["guessing"],
        ratio=medians["guessing"] / medians["plain"],
        drafted=drafted,
        accepted_share=accepted / drafted if drafted else None,
    )


def table(rows: Sequence[Row]) -> str:
    shown = [
        [row.text, row.load, row.plain_tokens_per_s, row.guessing_tokens_per_s, row.ratio, row.drafted, row.accepted_share] for row in rows
    ]
    return common.markdown_table(["text", "at once", "plain tok/s", "guessing tok/s", "ratio", "guesses", "share right"], shown)


async def _measured(machine: common.Machine) -> tuple[dict[str, Any], str]:
    guessing, plain = engines.open_backend(), engines.open_backend(speculation="off")
    try:
        card = await plain.card()
        kinds = ["copying", "free", *(["text"] if FLAGS.text else [])]
        rows = [await compare(plain, guessing, kind, int(load)) for kind in kinds for load in FLAGS.loads]
    finally:
        await plain.close()
        await guessing.close()
    report = {
        "benchmark": "speculation",
        "machine": msgspec.to_builtins(machine),
        "settings": common.settings(__name__) | engines.settings(),
        "model": msgspec.to_builtins(card),
        "results": msgspec.to_builtins(rows),
    }
    return report, f"{common.machine_line(machine)}\n\n{card.id}: with guesses and without\n\n{table(rows)}"


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
