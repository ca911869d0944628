"""What rounding costs, through the engine itself: perplexity and top-1 agreement of variants beside the unrounded model on the same rows.

A variant is WEIGHTS or WEIGHTS/KV: a --quantization (empty: none) and a --kv_cache_dtype. Rows are runs of tokens of --text, scored as
prompts; differences are paired by row, so the 95 % interval is that of the mean difference over rows.

Examples:
  python -m bench.quality --model=checkpoints/nova-small --text=TEXT --variants=int8,balanced,/int8,/int8-int4
  python -m bench.quality --model=DIR --text=TEXT --rows=64 --row_tokens=256 --variants=memory_critical --json
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from absl import app, flags

from bench import common
from novajax.core.errors import NovaError
from novajax.core.types import SamplingParams
from novajax.llm import LLM

FLAGS = flags.FLAGS
_Z95 = 1.96


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    flags.adopt_module_key_flags(common)
    flags.DEFINE_string("model", None, "directory of the model", required=True)
    flags.DEFINE_string("text", None, "file of plain text to score", required=True)
    flags.DEFINE_list("variants", [], "what to compare with the unrounded model: WEIGHTS or WEIGHTS/KV, with commas between")
    flags.DEFINE_integer("rows", 48, "rows of text", lower_bound=2)
    flags.DEFINE_integer("row_tokens", 128, "tokens of a row", lower_bound=2)
    flags.DEFINE_integer("skip_tokens", 0, "tokens of the text to leave out at its beginning", lower_bound=0)


class Scores(msgspec.Struct, frozen=True):
    """Of every predicted token of the rows."""

    logprobs: np.ndarray  # float64[rows, row_tokens - 1]
    best: np.ndarray  # int64, the most likely token

    @property
    def perplexity(self) -> float:
        return math.exp(-float(self.logprobs.mean()))


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A variant beside the unrounded model."""

    variant: str
    perplexity: float
    change: float
    """Of perplexity, relative."""
    change_low: float
    change_high: float
    agreement: float
    """Share of tokens with the same most likely one."""


def compare(variant: str, plain: Scores, other: Scores) -> Loss:
    """The change of perplexity with its 95 % interval over rows."""
    rows = (plain.logprobs - other.logprobs).mean(axis=1)
    mean, spread = float(rows.mean()), _Z95 * float(rows.std(ddof=1)) / math.sqrt(len(rows))
    return Loss(
        variant=variant,
        perplexity=other.perplexity,
        change=math.expm1(mean),
        change_low=math.expm1(mean - spread),
        change_high=math.expm1(mean + spread),
        agreement=float((plain.best == other.best).mean()),
    )


def score(variant: str, rows: Sequence[Sequence[int]]) -> Scores:
    """Scores the rows as prompts of an engine of that variant."""
    weights, _, pages = variant.partition("/")
    common.say(f"scoring {variant or 'float'}")
    how = {"quantization": weights, "kv_cache_dtype": pages or "auto", "max_rows": 4, "prefix_cache": False}
    with LLM(FLAGS.model, max_context_tokens=max(16, len(rows[0]) + 1), **how) as llm:
        done = llm.generate(rows, SamplingParams(max_tokens=0, prompt_logprobs=1, temperature=0))
    told = [[entry for entry in (one.prompt_logprobs or ()) if entry is not None] for one in done]
    return Scores(
        np.array([[entry.logprob for entry in row] for row in told]), np.array([[entry.top[0].token for entry in row] for row in told])
    )


def rows_of(text: str, model: str) -> list[list[int]]:
    """Runs of tokens, each behind the model's own beginning of text where it has one."""
    from novajax.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(model)
    ids = tokenizer.encode(text)[FLAGS.skip_tokens :]
    first = tokenizer.encode("")
    run = FLAGS.row_tokens - len(first)
    rows = [[*first, *ids[start : start + run]] for start in range(0, len(ids) - run + 1, run)][: FLAGS.rows]
    if len(rows) < FLAGS.rows:
        common.say(f"the text has {len(rows)} rows of {FLAGS.row_tokens} tokens, not {FLAGS.rows}")
    return rows


def main(_: list[str]) -> int:
    logging.getLogger().setLevel(logging.WARNING)
    machine = common.describe_machine(probe=False)
    try:
        rows = rows_of(Path(FLAGS.text).read_text("utf-8"), FLAGS.model)
        plain = score("/model", rows)
        losses = [compare(variant, plain, score(variant, rows)) for variant in FLAGS.variants]
    except (NovaError, OSError, ValueError) as error:
        raise app.UsageError(str(error), exitcode=2) from error
    report = {
        "benchmark": "quality",
        "machine": msgspec.to_builtins(machine),
        "settings": common.settings(__name__),
        "perplexity": plain.perplexity,
        "results": msgspec.to_builtins(losses),
    }
    cells = [[one.variant, one.perplexity, _percent(one), f"{one.agreement:.2%}"] for one in losses]
    table = common.markdown_table(["variant", "perplexity", "change (95 %)", "top-1 agreement"], cells)
    headline = f"{FLAGS.model}: {len(rows)} rows of {FLAGS.row_tokens} tokens, perplexity {plain.perplexity:.4f} unrounded"
    common.publish(report, f"{common.machine_line(machine)}\n\n{headline}\n\n{table}")
    return 0


def _percent(loss: Loss) -> str:
    return f"{loss.change:+.2%} ({loss.change_low:+.2%} to {loss.change_high:+.2%})"


if __name__ == "__main__":
    define_flags()
    app.run(main)
