"""Chooses a precision for every matrix of a model by what it costs on text, and seals the model so rounded.

Each matrix is rounded alone to each format and the change of the model's predictions measured, and estimated from one pass of
gradients; the best map in a budget is chosen; 4-bit matrices are rounded layer after layer so that errors compensate each other,
and their scales learned. --output is a sealed checkpoint (--model=OUTPUT) that also holds profile.json (--quantization=PATH with the
unrounded model, without compensation), report.html and report.json. Experts' matrices are not compensated.

Examples:
  python -m novajax.quantize --model=DIR --text=TEXT --budget_share=0.22 --output=OUT
  python -m novajax.quantize --model=DIR --text=A.txt,B.txt --evaluation_text=C.txt --max_loss=0.02 --output=OUT --json
  python -m novajax.quantize --model=DIR --text=TEXT --budget_bytes=4Gi --sensitivity=estimated --nocompare --output=OUT

Exit codes: 0 done; 1 flags, model, text, budget or output not usable (no output is left); 130 interrupted (no output is left).
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
from absl import app, flags, logging

from novajax.core.errors import ConfigError
from novajax.telemetry.progress import Progress, Report, Silent

_NOT_USABLE, _INTERRUPTED = 1, 130
_EVALUATION_SHARE = 0.3
"""Of the rows of --text, its end, where no other text is given."""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    flags.DEFINE_string("model", None, "a Hugging Face directory, a sealed NovaJAX directory, or a hub id org/name[@revision]")
    flags.DEFINE_list("text", [], "files of plain text like what the model will see; control tokens in them count as such")
    flags.DEFINE_list("evaluation_text", [], "other files to report losses on; the last 30 % of --text if not given")
    flags.DEFINE_string("output", None, "the directory to make; it must not exist")
    flags.DEFINE_string("budget_bytes", None, "most bytes of weights, like 4Gi")
    flags.DEFINE_float("budget_share", None, "the same as a share of the float32 weights", lower_bound=0.0)
    flags.DEFINE_float("max_loss", None, "or: most that perplexity may rise on --text, 0.05 for 5 %", lower_bound=0.0)
    formats = "formats to choose from, beside leaving a matrix as it is"
    flags.DEFINE_list("formats", ["int8", "fp8", "int4-32", "int4-64", "int4-128", "int4-channel"], formats)
    flags.DEFINE_enum("sensitivity", "measured", ["measured", "estimated"], "how the cost of a matrix in a format is known")
    flags.DEFINE_integer("rows", 512, "most rows of --text to calibrate on", lower_bound=2)
    flags.DEFINE_integer("sensitivity_rows", 64, "about how many of them each matrix is measured on", lower_bound=1)
    flags.DEFINE_integer("row_tokens", 256, "tokens of a row, at most the model's context", lower_bound=8)
    flags.DEFINE_integer("batch_rows", 8, "rows that go through the model together", lower_bound=1)
    flags.DEFINE_integer("tune_steps", 200, "batches to learn scales on; 0: scales stay as they were chosen", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of the tokens that the estimate draws")
    flags.DEFINE_string("mesh", "", "how the model is cut over devices meanwhile: tensor=2 (default: one device)")
    flags.DEFINE_bool("compare", True, "also report named profiles, one format for all and mixes of two, treated alike")
    flags.DEFINE_bool("quiet", False, "show no progress")
    flags.DEFINE_bool("json", False, "print the report as JSON on stdout")


def main(_: list[str]) -> int:
    if not FLAGS.model or not FLAGS.output or not FLAGS.text:
        raise app.UsageError("--model, --text and --output are needed", exitcode=_NOT_USABLE)
    if sum(FLAGS[name].value is not None for name in ("budget_bytes", "budget_share", "max_loss")) != 1:
        raise app.UsageError("one of --budget_bytes, --budget_share and --max_loss is needed", exitcode=_NOT_USABLE)
    logging.set_verbosity(logging.WARNING)
    try:
        report = quantize(Path(FLAGS.output).absolute(), Silent if FLAGS.quiet else Progress)
    except ConfigError as error:
        sys.stderr.write(f"novajax: {error.message}\n")
        return _NOT_USABLE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was kept\n")
        return _INTERRUPTED
    if FLAGS.json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        sys.stderr.write(summary(report) + "\n")
    return 0


def quantize(output: Path, progress: Report) -> Any:
    """Makes `output` as the flags say and returns its report. Raises ConfigError, WeightsError or CapacityError."""
    import jax.numpy as jnp  # jax starts only after the flags were understood

    from novajax.calibration import texts
    from novajax.calibration.study import Settings, Study
    from novajax.core.config import parse_bytes, parse_mesh
    from novajax.models.decoder import parameter_count
    from novajax.parallel.mesh import mesh_for
    from novajax.text.tokenizer import Tokenizer, check_vocabulary
    from novajax.weights.load import describe, load_model
    from novajax.weights.seal import check_output

    description = describe(FLAGS.model)
    cfg, mesh = description.config, parse_mesh(FLAGS.mesh)
    if mesh.devices != mesh.tensor_parallel:
        raise ConfigError(f"mesh {FLAGS.mesh!r}: only tensor cuts a model while it is quantized", param="mesh")
    check_output(output, 4 * parameter_count(cfg))
    tokenizer = Tokenizer(description.directory)
    check_vocabulary(tokenizer, cfg.vocab)
    row_tokens = min(FLAGS.row_tokens, cfg.max_context_tokens)
    rows = texts.rows_of([Path(file) for file in FLAGS.text], tokenizer, row_tokens)
    if FLAGS.evaluation_text:
        evaluation = texts.rows_of([Path(file) for file in FLAGS.evaluation_text], tokenizer, row_tokens)
    else:
        rows, evaluation = texts.split(rows, _EVALUATION_SHARE)
    batches, other = (tuple(texts.batches(part[: FLAGS.rows], FLAGS.batch_rows)) for part in (rows, evaluation))
    if not batches or not other:
        raise ConfigError(f"the text has {len(rows)} rows, {len(evaluation)} to evaluate: less than {FLAGS.batch_rows}", param="text")
    loaded = load_model(description, mesh_for(mesh, cfg.kv_heads), jnp.float32, progress=progress)
    settings = Settings(
        formats=tuple(FLAGS.formats),
        sensitivity_batches=max(1, FLAGS.sensitivity_rows // FLAGS.batch_rows),
        measure=FLAGS.sensitivity == "measured",
        tune_steps=FLAGS.tune_steps,
        seed=FLAGS.seed,
    )
    study = Study(loaded, batches, other, settings, progress)
    if FLAGS.max_loss is not None:
        formats, predicted, state = study.at_most(FLAGS.max_loss)
    else:
        share = FLAGS.budget_share
        formats, predicted = study.within(parse_bytes(FLAGS.budget_bytes) if share is None else int(share * study.float32_bytes))
        state = study.rounded(formats)
    report = study.report(formats, predicted, state, FLAGS.text, FLAGS.evaluation_text, compare=FLAGS.compare)
    write(study, formats, state, report, output, progress)
    return report


def write(study: Any, formats: Any, state: Any, report: Any, output: Path, progress: Report) -> None:
    """Everything beside `output`, then renamed: it is whole, or not there."""
    from novajax.calibration.maps import map_rules
    from novajax.calibration.page import page
    from novajax.quant.profile_file import ProfileFile, write_profile
    from novajax.weights.seal import seal

    partial = output.with_name(f".{output.name}.quantized-{os.getpid()}")
    try:
        rules = map_rules(study.matrices, formats)
        seal(dataclasses.replace(study.loaded, state=state), partial, profile="calibrated", rules=rules, progress=progress)
        write_profile(partial / "profile.json", ProfileFile(model=report.model, rules=rules))
        (partial / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
        (partial / "report.html").write_text(page(report), "utf-8")
        partial.rename(output)
    except OSError as error:
        raise ConfigError(f"{output}: {error.strerror or error}", param="output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def summary(report: Any) -> str:
    """The maps as lines, and how well the estimate ranks."""
    lines = [
        f"{report.model}: perplexity {report.perplexity:.4f} unrounded, on {report.evaluation_rows} rows of {report.row_tokens} tokens"
    ]
    for one in report.maps:
        loss = one.loss
        lines.append(
            f"  {one.share:.4f}  {loss.change:+7.2%} ({loss.change_low:+.2%} to {loss.change_high:+.2%})  KL {loss.divergence:.4f}  "
            f"same token {loss.agreement:.2%}  {one.name}, {one.treatment}"
        )
    ranks = ", ".join(f"{name} {value:.3f}" for name, value in report.rank_correlation.items())
    return "\n".join([*lines, f"rank correlation of estimate and measurement: {ranks}"] if ranks else lines)


if __name__ == "__main__":
    define_flags()
    app.run(main)
