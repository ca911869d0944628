"""Seals a model: from a Hugging Face directory or hub id to an Orbax checkpoint with a manifest of sha256.

A sealed directory starts faster (nothing is transposed or converted), is checked file by file on every load, and holds
the tokenizer, template and configuration beside the arrays. It is written beside --output and renamed when whole. The
model is loaded onto the devices here, so they must hold it (twice with --verify).

Examples:
  python -m novajax.convert --model=checkpoints/novachat --output=/tmp/novachat-sealed
  python -m novajax.convert --model=org/name@revision --output=DIR --dtype=bfloat16 --verify
  python -m novajax.convert --model=DIR --output=SEALED --json > summary.json

Exit codes: 0 sealed; 1 flags, model or output not usable (no output is left); 130 interrupted (no output is left).
"""

import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from absl import app, flags, logging

from novajax.core.errors import ConfigError
from novajax.telemetry.progress import Progress, Report, Silent, quantity, seconds
from novajax.weights.rounding import Requantized

_NOT_USABLE, _INTERRUPTED = 1, 130

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    flags.DEFINE_string("model", None, "a Hugging Face directory, a sealed NovaJAX directory, or a hub id org/name[@revision]")
    flags.DEFINE_string("output", None, "the directory to make; it must not exist")
    stored = "type to store; auto: as it is stored now (float16 becomes float32)"
    flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], stored)
    flags.DEFINE_string("quantization", "", "a precision profile (name or PATH.json) or format to store the weights in (default none)")
    flags.DEFINE_bool("verify", False, "load what was written and compare it bit for bit; also refuse NaN and infinity")
    flags.DEFINE_bool("quiet", False, "show no progress")
    flags.DEFINE_bool("json", False, "print the summary as JSON on stdout")


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints."""

    output: str
    source: str
    dtype: str
    profile: str
    parameters: int
    bytes: int
    files: int
    digest: str
    load_s: float
    seal_s: float
    verified: bool
    requantized: Requantized | None
    """What became of a source that others quantized."""


def main(_: list[str]) -> int:
    model, output = FLAGS.model, FLAGS.output
    if not model or not output:
        raise app.UsageError("--model and --output are needed", exitcode=_NOT_USABLE)
    logging.set_verbosity(logging.WARNING)
    try:
        progress = Silent if FLAGS.quiet else Progress
        summary = convert(model, Path(output), FLAGS.dtype, FLAGS.quantization, verify=FLAGS.verify, progress=progress)
    except ConfigError as error:
        sys.stderr.write(f"novajax: {error.message}\n")
        return _NOT_USABLE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was kept\n")
        return _INTERRUPTED
    if FLAGS.json:
        sys.stdout.write(msgspec.json.encode(summary).decode() + "\n")
    else:
        sys.stderr.write(
            f"{summary.output}: {summary.source}, {summary.parameters:,} parameters in {summary.profile or summary.dtype}, "
            f"{quantity(summary.bytes, 'B')} in {summary.files} files; loaded in {seconds(summary.load_s)}, "
            f"sealed in {seconds(summary.seal_s)}{', verified' if summary.verified else ''}; "
            f"{f'{summary.requantized}; ' if summary.requantized else ''}digest {summary.digest[:16]}\n"
        )
    return 0


def convert(model: str, output: Path, dtype: str, quantization: str, *, verify: bool, progress: Report) -> Summary:
    """Seals `model` at `output`, quantized as it is read where that is wanted. Raises ConfigError, WeightsError or CapacityError."""
    from novajax.models.decoder import parameter_count  # jax starts only after the flags were understood
    from novajax.parallel.mesh import make_mesh
    from novajax.quant.profiles import rules_of
    from novajax.weights.load import describe, load_model
    from novajax.weights.seal import check_output, seal

    description = describe(model)
    wanted = stored_dtype(description) if dtype == "auto" else dtype
    output = output.absolute()
    check_output(output, parameter_count(description.config) * (2 if wanted == "bfloat16" else 4))
    rules = rules_of(quantization, tied=description.config.tied_embedding) if quantization else description.rules
    loaded = load_model(description, make_mesh(), wanted, quantization=quantization, progress=progress)
    began_s = time.monotonic()
    manifest = seal(loaded, output, profile=Path(quantization).stem or description.profile, rules=rules, progress=progress, verify=verify)
    return Summary(
        output=str(output),
        source=manifest.source,
        dtype=manifest.dtype,
        profile=manifest.profile,
        parameters=manifest.parameters,
        bytes=sum(entry.size_bytes for entry in manifest.files),
        files=len(manifest.files),
        digest=manifest.digest,
        load_s=round(loaded.seconds, 3),
        seal_s=round(time.monotonic() - began_s, 3),
        verified=verify,
        requantized=loaded.requantized,
    )


def stored_dtype(description: Any) -> str:
    """ "float32" or "bfloat16": what holds the weights as they are stored now, most of their bytes deciding."""
    from novajax.weights.safetensors import SafetensorsDirectory

    if description.manifest is not None:
        return description.manifest.dtype
    size_bytes: dict[str, int] = {}
    with SafetensorsDirectory(description.directory) as directory:
        for tensor in directory.tensors.values():
            size_bytes[tensor.dtype] = size_bytes.get(tensor.dtype, 0) + tensor.stop - tensor.start
    return "bfloat16" if max(size_bytes, key=lambda word: size_bytes[word], default="") == "BF16" else "float32"


if __name__ == "__main__":
    define_flags()
    app.run(main)
