"""The engine's options as absl flags, shared by every entry point that opens an engine, with a YAML file behind them.

A flag that was given wins over the file, the file over the defaults of `EngineConfig`. The file is
`engine: {...}` and `server: {...}` with the field names of those two structs, or an `llm_engine:` tree; unknown keys are refused by path.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import structlog
import yaml
from absl import flags

from novajax.core.config import EngineConfig, parse_bytes, parse_mesh
from novajax.core.errors import ConfigError
from novajax.deployment import engine_fields, not_honoured

_SIZES = {"kv_bytes"}


class ConfigFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The YAML document. Each part is checked when it is joined with the flags."""

    engine: dict[str, Any] = {}
    server: dict[str, Any] = {}
    cluster: dict[str, Any] = {}
    """`cluster.settings.ClusterSettings`: how the engine's processes are started and watched."""
    quality: dict[str, Any] = {}
    """`cluster.quality.QualitySettings`: how many answers are scored again by a more precise engine."""
    llm_engine: dict[str, Any] = {}
    """A cluster owner's tree (`core.llm_engine`); `engine:` wins over what it settles."""
    architecture: dict[str, Any] = {}
    """A config.json to plan for without weights; a start does not read it."""
    plan: dict[str, Any] = {}
    """`core.plan.PlanConfig`; a start does not read it."""


def define_engine_flags() -> None:
    """Declares the engine's flags. Call once, at the import of an entry point."""
    flags.DEFINE_string("config", None, "YAML file with `engine:` and `server:` sections; flags win over it")
    flags.DEFINE_string("model", None, "a Hugging Face directory, a sealed NovaJAX directory, or a hub id org/name[@revision]")
    flags.DEFINE_string("served_name", None, "the model's name in answers; the last part of --model if not given")
    flags.DEFINE_enum("dtype", None, ["auto", "float32", "bfloat16"], "type of weights and KV; auto: what the device computes best")
    flags.DEFINE_string(
        "quantization", None, "memory_critical, balanced, quality_critical, or a format: int8, fp8, int4, int4-32 ... (default none)"
    )
    flags.DEFINE_string("kv_cache_dtype", None, "what KV pages hold: model, int8, fp8, int8-int4; auto (default): as --quantization says")
    flags.DEFINE_string("mesh", None, "how one program is cut over devices: tensor=2,stage=2,context=1,data=1 (default: one device)")
    flags.DEFINE_integer("max_rows", None, "most sequences that decode in one step (default 16)", lower_bound=1)
    flags.DEFINE_integer("max_context_tokens", None, "context to serve; the model's own if not given", lower_bound=16)
    flags.DEFINE_integer("page_tokens", None, "tokens in a KV page (default 16)", lower_bound=8)
    flags.DEFINE_string("kv_bytes", None, "size of the KV pool, like 512Mi; chosen from rows, context and memory if not given")
    flags.DEFINE_integer("chunk_tokens", None, "most prompt tokens of one sequence in one step (default 256)", lower_bound=16)
    flags.DEFINE_integer("max_waiting", None, "requests that may queue before 429 (default 256)", lower_bound=0)
    flags.DEFINE_integer("in_flight", None, "plans on the device at once: 1 synchronous, 2 runs one ahead (default)", lower_bound=1)
    flags.DEFINE_bool("prefix_cache", None, "share the KV of equal prompt beginnings (default yes)")
    flags.DEFINE_bool("deterministic", None, "one step shape only: the same bits alone and in a crowd (default no)")
    flags.DEFINE_enum(
        "speculation",
        None,
        ["auto", "off", "lookup", "draft"],
        "who guesses next tokens; auto (default): --draft_model or the text itself",
    )
    flags.DEFINE_string("draft_model", None, "a small model with the same tokens that guesses for --model (default none)")
    flags.DEFINE_bool("verify_hashes", None, "check the hashes of a sealed model on load (default yes)")
    flags.DEFINE_string("trace_file", None, "where to write the last steps' times at the end, for Perfetto (default nowhere)")
    flags.DEFINE_enum("native_kernels", None, ["auto", "on", "off"], "C++ kernels on a CPU; auto (default): where a compiler builds them")
    flags.DEFINE_string("compile_cache", None, "directory of compiled programs, trusted; '' for none (default: the user's cache folder)")


def read_config(values: flags.FlagValues) -> ConfigFile:
    """The file of --config, or an empty one. Raises ConfigError naming the file and the key."""
    path = values["config"].value
    if path is None:
        return ConfigFile()
    try:
        return msgspec.convert(yaml.safe_load(Path(path).read_text("utf-8")) or {}, ConfigFile)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from None


def engine_config(values: flags.FlagValues, file: ConfigFile) -> EngineConfig:
    """Flags over file over defaults. Raises ConfigError for what is not understood or no model."""
    merged: dict[str, Any] = {"compile_cache": default_compile_cache()} | engine_fields(file.llm_engine) | file.engine
    for line in not_honoured(file.llm_engine):
        structlog.get_logger("novajax.options").warning(line)
    for name in EngineConfig.__struct_fields__:
        if name in values and values[name].value is not None:
            merged[name] = values[name].value
    if file.llm_engine and "mesh" not in merged:
        merged["mesh"] = planned_mesh(values["config"].value or "")
    if "mesh" in merged:
        merged["mesh"] = msgspec.to_builtins(parse_mesh(merged["mesh"]))
    for name in _SIZES & merged.keys():
        if isinstance(merged[name], str):
            merged[name] = parse_bytes(merged[name])
    if not merged.get("model"):
        raise ConfigError("no model was named: give --model=DIR or --model=org/name", param="model")
    try:
        return msgspec.convert(merged, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"engine: {error}") from None


def planned_mesh(path: str) -> dict[str, Any]:
    """What the planner chooses for `sharding: auto`, in a process of its own since it reads the model through jax. Logs why.

    Raises ConfigError with the planner's own words.
    """
    done = subprocess.run([sys.executable, "-m", "novajax.plan", f"--config={path}", "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sharding auto: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", param="sharding")
    plan = msgspec.json.decode(done.stdout)
    for line in (*plan["why"], *plan["warnings"]):
        structlog.get_logger("novajax.options").info(f"sharding auto: {line}")
    return plan["mesh"]


def default_compile_cache() -> str:
    """Where compiled programs are kept between starts: a folder of this user's."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "novajax", "compiled")
