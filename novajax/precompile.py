"""The child of `novajax.plan --compile`: compiles the engine's step on virtual devices, which must exist before jax starts.

A job comes as JSON on stdin, the result leaves as JSON on stdout. With the CUDA plugin (extra `plan`) and a target description the
devices are virtual GPUs and no GPU is needed; otherwise they are virtual CPU devices.

Examples:
  python -m novajax.plan --config=configs/llama-3.1-405b.yaml --compile     # starts it

Exit codes: 0 compiled; 1 the job is not usable (the last line of stderr says why).
"""

import importlib.util
import os
import sys
from typing import Any

import msgspec

from novajax.core.config import EngineConfig
from novajax.core.errors import NovaError
from novajax.planner.compiled import Compiled


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One bucket."""

    rows: int
    """Decode rows of one data partition in a step."""
    chunk: int
    """Prompt tokens, or 0."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to compile."""

    architecture: dict[str, Any]
    """A config.json."""
    engine: EngineConfig
    dtype: str
    pages: int
    """Of one data partition."""
    work: tuple[Work, ...]
    hosts: int
    gpus_per_host: int
    target: str = ""
    """OpenXLA's description of the chip; empty: none."""
    target_name: str = ""


def main() -> int:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    try:
        print(msgspec.json.encode(compile_all(job)).decode())
    except NovaError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


def compile_all(job: Job) -> list[Compiled]:
    """Every bucket of the job. Starts jax."""
    gpu = bool(job.target) and has_cuda_plugin()
    devices = virtual_gpus(job) if gpu else virtual_cpus(job.engine.mesh.devices)
    from novajax.engine.ahead import compile_shallow
    from novajax.models.families.registry import read_config

    model = read_config(job.architecture)
    on_cpu = "virtual CPU devices, where XLA adds and passes on bfloat16 as float32"
    target = f"{job.target_name}, {job.dtype}" if gpu else f"{on_cpu}, {job.dtype}"
    return [compile_shallow(model, job.engine, job.dtype, one.rows, one.chunk, job.pages, devices, target) for one in job.work]


def has_cuda_plugin() -> bool:
    """Whether the compiler for NVIDIA GPUs is installed; its libraries and a driver are not needed."""
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:
        return False


def virtual_gpus(job: Job) -> list[Any]:
    """The devices of a topology of that many hosts, one process a GPU."""
    from jax.experimental import topologies

    shape = f"{job.hosts}x{job.gpus_per_host}x1"
    return list(topologies.get_topology_desc(platform="cuda", target_config=job.target, topology=shape).devices)


def virtual_cpus(count: int) -> list[Any]:
    """The pass that widens bfloat16 all-reduces is off: XLA:CPU's fails on those of a shard_map (jaxlib 0.11.2), and nothing runs here."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_disable_hlo_passes=all-reduce-promotion"
    import jax

    jax.config.update("jax_num_cpu_devices", count)
    return list(jax.devices())


if __name__ == "__main__":
    sys.exit(main())
