"""Plans a deployment before anyone books it: bytes per device, collectives, lower bounds on time, the best layout and why.

Pure arithmetic over the model's abstract parameters; no weights and no accelerator are needed. What cannot fit is refused with the
numbers. --compile also compiles the engine's real partitioned step on virtual devices and reads memory and collectives from it.

Examples:
  python -m novajax.plan --config=configs/llama-3.1-405b.yaml
  python -m novajax.plan --config=configs/llama-3.1-405b.yaml --chip=h200 --nodes=4 --layout=tensor=8,stage=4 --profile=int8
  python -m novajax.plan --config=configs/llama-405b-reference.yaml --json > plan.json
  python -m novajax.plan --config=configs/llama-3.1-70b.yaml --profile=auto --png=bounds.png
  python -m novajax.plan --model=checkpoints/nova-small --chip=h100 --nodes=1 --compile

Exit codes: 0 planned; 1 a flag, file or model is not usable; 3 no layout fits.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import yaml
from absl import app, flags

from novajax import deployment
from novajax.core.config import EngineConfig
from novajax.core.errors import CapacityError, ConfigError
from novajax.core.llm_engine import LlmEngine, read_tree
from novajax.core.plan import PlanConfig
from novajax.models.families.registry import read_config
from novajax.models.sizes import model_sizes
from novajax.planner.chart import write_chart
from novajax.planner.compiled import Compiled
from novajax.planner.formats import profiles
from novajax.planner.hardware import chips
from novajax.planner.plan import Plan, comparisons, make_plan, scaling
from novajax.planner.report import report
from novajax.precompile import Job, Work

_NOT_USABLE, _DOES_NOT_FIT = 1, 3
_PUBLISHED = {8_030_261_248: "8b", 70_553_706_496: "70b", 405_853_388_800: "405b"}
"""Parameters of the models that published results are known for: Llama 3.1."""

_TARGETS = Path(__file__).resolve().parents[1] / "configs" / "targets"
_COMPILE_S = 900
"""Longest that the child may take."""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    flags.DEFINE_string("config", None, "YAML file with `architecture:` and `plan:`, or an `llm_engine:` tree; flags win over it")
    flags.DEFINE_string("model", None, "a directory with a config.json, in place of `architecture:`")
    flags.DEFINE_enum("chip", None, list(chips()), "the accelerator")
    flags.DEFINE_integer("nodes", None, "hosts to book", lower_bound=1)
    flags.DEFINE_integer("gpus_per_node", None, "GPUs in each; the chip's usual host if not given", lower_bound=1)
    flags.DEFINE_string("network_bandwidth", None, "of a host, one direction, like 3200Gbps")
    flags.DEFINE_string("layout", None, "auto, or axes like tensor=8,stage=2,context=1,data=1; replicas fill the rest")
    flags.DEFINE_enum("profile", None, ["auto", *profiles()], "precision of weights, KV and activations; auto: the most exact that fits")
    flags.DEFINE_integer(
        "rows", None, "sequences at once in a replica; what the memory holds if not given", lower_bound=1, upper_bound=1024
    )
    flags.DEFINE_integer("context_tokens", None, "the longest request", lower_bound=16)
    flags.DEFINE_integer("prompt_tokens", None, "of a mean request", lower_bound=1)
    flags.DEFINE_integer("output_tokens", None, "of a mean request", lower_bound=1)
    flags.DEFINE_integer("chunk_tokens", None, "most prompt tokens of one sequence in one step", lower_bound=16)
    flags.DEFINE_integer("page_tokens", None, "tokens of a KV page on one device; chosen if not given", lower_bound=8)
    flags.DEFINE_string("ttft", None, "wanted time to the first token, like 200ms")
    flags.DEFINE_string("token_time", None, "wanted time between tokens of a stream, like 20ms")
    flags.DEFINE_bool("compile", False, "also compile the real step for the layout and read memory and collectives from it")
    flags.DEFINE_string("png", None, "write a chart of the bounds from 1 to 64 nodes there")
    flags.DEFINE_bool("json", False, "print the plan as JSON on stdout")


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What a configuration asks to plan."""

    name: str
    architecture: dict[str, Any]
    """A config.json."""
    config: PlanConfig
    notes: tuple[str, ...] = ()


def main(_: list[str]) -> int:
    try:
        given = {name: FLAGS[name].value for name in PlanConfig.__struct_fields__ if name in FLAGS and FLAGS[name].value is not None}
        subject = read_subject(FLAGS.config, FLAGS.model, given)
        plan = make(subject, compiled=FLAGS.compile)
        if FLAGS.png:
            write_chart(plan, Path(FLAGS.png))
    except CapacityError as error:
        print(f"novajax.plan: it does not fit: {error.message}", file=sys.stderr)
        return _DOES_NOT_FIT
    except ConfigError as error:
        print(f"novajax.plan: {error.message}", file=sys.stderr)
        return _NOT_USABLE
    for note in subject.notes:
        print(note, file=sys.stderr)
    print(msgspec.json.encode(plan).decode() if FLAGS.json else "\n".join(report(plan)))
    return 0


def make(subject: Subject, *, compiled: bool) -> Plan:
    """The plan with scaling, published results and, if asked, what XLA says."""
    sizes = model_sizes(read_config(subject.architecture))
    plan = make_plan(subject.name, sizes, subject.config)
    known = _PUBLISHED.get(sizes.parameters)
    beside = comparisons({known: sizes}) if known else ()
    plan = msgspec.structs.replace(plan, scaling=scaling(sizes, subject.config), comparisons=beside)
    return msgspec.structs.replace(plan, compiled=compile_step(subject, plan)) if compiled else plan


def compile_step(subject: Subject, plan: Plan) -> tuple[Compiled, ...]:
    """The engine's step on one replica of the chosen layout, decoding alone and with a chunk. Raises ConfigError if the child fails."""
    memory, _ = plan.chosen.fitted()
    layout, config = plan.chosen.layout, subject.config
    rows = max(layout.data * layout.stage, memory.rows // (layout.data * layout.stage) * layout.data * layout.stage)
    engine = EngineConfig(
        model=subject.name,
        mesh=layout.mesh(),
        max_rows=rows,
        max_context_tokens=config.context_tokens,
        page_tokens=plan.chosen.page_tokens,
        chunk_tokens=config.chunk_tokens,
    )
    target = _TARGETS / f"{plan.cluster.chip.name}.txtpb"
    each = rows // (layout.data * layout.stage)
    per_host = min(plan.cluster.gpus_per_host, layout.group_devices)
    job = Job(
        architecture=subject.architecture,
        engine=engine,
        dtype="float32" if plan.chosen.profile == "float32" else "bfloat16",
        pages=memory.pages,
        work=(Work(rows=each, chunk=0), Work(rows=each, chunk=config.chunk_tokens)),
        hosts=-(-layout.group_devices // per_host),
        gpus_per_host=per_host,
        target=target.read_text("utf-8") if target.exists() else "",
        target_name=f"{layout.group_devices} virtual {plan.cluster.chip.name}",
    )
    child = [sys.executable, "-m", "novajax.precompile"]
    done = subprocess.run(child, input=msgspec.json.encode(job), capture_output=True, check=False, timeout=_COMPILE_S)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise ConfigError(f"the step could not be compiled: {lines[-1]}", param="compile")
    return msgspec.json.decode(done.stdout, type=tuple[Compiled, ...])


def read_subject(path: str | None, model: str | None, given: dict[str, Any]) -> Subject:
    """Joins the file and the flags; flags win. Raises ConfigError naming the file and the key."""
    document: dict[str, Any] = {}
    if path is not None:
        document = _read_yaml(Path(path))
        unknown = document.keys() - {"architecture", "plan", "llm_engine", "engine", "server", "cluster"}
        if unknown:
            raise ConfigError(f"{path}: unknown section {sorted(unknown)[0]!r}")
    notes: tuple[str, ...] = ()
    tree = read_tree(document["llm_engine"]) if "llm_engine" in document else None
    if tree and "plan" in document:
        raise ConfigError(f"{path}: `plan:` and `llm_engine:` both say what to plan; keep one", param="plan")
    config = deployment.plan_config(tree) if tree else deployment.read_plan_section(document.get("plan") or {})
    config = deployment.read_plan_section(msgspec.structs.asdict(config) | given)
    if tree:
        notes = deployment.not_honoured(document["llm_engine"])
    name, architecture = _architecture(Path(path) if path else None, model, document, tree)
    return Subject(name=name, architecture=architecture, config=config, notes=notes)


def _architecture(path: Path | None, model: str | None, document: dict[str, Any], tree: LlmEngine | None) -> tuple[str, dict[str, Any]]:
    """(name, config.json) from --model, the file, or the file beside it that model_id means."""
    if model is not None:
        file = Path(model) / "config.json"
        try:
            return Path(model).resolve().name, json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: {error}", param="model") from None
    if path is not None and "architecture" in document:
        return path.stem, document["architecture"]
    if path is not None and tree is not None:
        beside = _read_yaml(deployment.architecture_file(tree.model.model_id, path.parent))
        return tree.model.model_id, beside.get("architecture") or {}
    raise ConfigError("no model was named: give --model=DIR, or a --config with `architecture:` or `llm_engine:`", param="model")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: the document is not a mapping")
    return document


if __name__ == "__main__":
    define_flags()
    app.run(main)
