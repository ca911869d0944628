"""Compiles the engine's step on eight virtual CPU devices for several layouts and depths; prints what was found, as JSON. A process of
its own: the devices must exist before jax starts."""

import sys

import msgspec

from novajax.precompile import virtual_cpus

DEVICES = virtual_cpus(8)

from planner_world import architecture, tiny_config  # noqa: E402

from novajax.core.config import EngineConfig, MeshConfig  # noqa: E402
from novajax.engine.ahead import compile_shallow, compile_step  # noqa: E402

LAYOUTS = {
    "tensor=2": MeshConfig(tensor_parallel=2),
    "tensor=4": MeshConfig(tensor_parallel=4),  # 2 KV heads: tensor 2 x query 2
    "stage=4,tensor=2": MeshConfig(stage=4, tensor_parallel=2),
    "context=4,tensor=2": MeshConfig(context=4, tensor_parallel=2),
    "stage=2,context=2,tensor=2": MeshConfig(stage=2, context=2, tensor_parallel=2),
    "data=2,tensor=4": MeshConfig(data=2, tensor_parallel=4),
}
ROWS, CHUNK, PAGES = 4, 16, 32


def layouts() -> dict:
    """The tiny model of 8 layers, float32: decode alone and with a chunk."""
    found = {}
    for name, mesh in LAYOUTS.items():
        rows = ROWS * mesh.data
        config = EngineConfig(model="m", mesh=mesh, max_rows=rows * mesh.stage, max_context_tokens=64, page_tokens=8, chunk_tokens=CHUNK)
        for chunk in (0, CHUNK):
            found[f"{name} {chunk}"] = compile_shallow(tiny_config(8), config, "float32", ROWS, chunk, PAGES, DEVICES, "cpu")
    return found


def depth() -> dict:
    """Llama 3.1 8B in bfloat16 on stage 2 x tensor 4: extrapolated from one and two layers a stage, and compiled whole."""
    mesh = MeshConfig(stage=2, tensor_parallel=4)
    config = EngineConfig(model="m", mesh=mesh, max_rows=8, max_context_tokens=512, page_tokens=16, chunk_tokens=64)
    model, found = architecture("8b"), {}
    for chunk in (0, 64):
        found[f"short {chunk}"] = compile_shallow(model, config, "bfloat16", 4, chunk, 64, DEVICES, "cpu")
        whole = compile_step(model, config, "bfloat16", 4, chunk, 64, DEVICES)
        found[f"whole {chunk}"] = msgspec.structs.asdict(whole) | {
            "collectives": [[*msgspec.structs.astuple(one), times] for one, times in whole.collectives.items()]
        }
    return found


if __name__ == "__main__":
    print(msgspec.json.encode({"layouts": layouts, "depth": depth}[sys.argv[1]]()).decode())
