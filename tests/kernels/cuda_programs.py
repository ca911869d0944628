"""Compiles the serving step of an 8B model's width, two layers deep, for an H200 that is not here; prints what the programs hold, as JSON.
A process of its own: the CUDA compiler is a plugin that jax looks for when it starts. Exits 3 where it is not installed."""

import importlib.util
import math
import os
import re
import sys
from pathlib import Path

if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
    sys.exit(3)
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

import jax
import jax.numpy as jnp
import msgspec
import yaml
from jax.experimental import topologies

from novajax.core.config import EngineConfig, MeshConfig
from novajax.engine.buckets import Bucket, make_table
from novajax.engine.build import abstract_arrays
from novajax.engine.capacity import Capacity
from novajax.engine.compiler import lower_forward
from novajax.engine.layout import Layout, kernels_for
from novajax.kv.pool import pool_bytes
from novajax.models.families.registry import read_config
from novajax.models.precision import quantized_model
from novajax.parallel.mesh import mesh_for
from novajax.planner.hlo import read_collectives
from novajax.quant.spread import state_shardings

CONFIGS = Path(__file__).parents[2] / "configs"
LAYERS, ROWS, PAGE, PAGES = 2, 16, 64, 2048
CASES = {
    "bfloat16": {},
    "int8": {"quantization": "int8"},
    "int8-a8": {"quantization": "int8-a8"},
    "fp8": {"quantization": "fp8"},
    "int4-128": {"quantization": "int4-128"},
    "KV int8": {"kv_cache_dtype": "int8"},
    "tensor=2": {"mesh": MeshConfig(tensor_parallel=2)},
    "chunk": {"chunk_tokens": 512},
}
_MADE = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* ([\w-]+)\(")
_HELD = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}


def compiled(devices, **fields):
    """(program, abstract pool)."""
    chunk = fields.get("chunk_tokens", 0)
    config = EngineConfig(model="m", max_rows=ROWS, max_context_tokens=4096, page_tokens=PAGE, **fields)
    model = read_config(yaml.safe_load((CONFIGS / "llama-3.1-8b.yaml").read_text())["architecture"])
    model = msgspec.structs.replace(model, layers=model.layers[:LAYERS])
    layout = Layout(mesh_for(config.mesh, model.kv_heads, devices), model, kernels=kernels_for(devices))
    table = make_table(config, 4096, on_cpu=False)
    graphdef, abstract = quantized_model(model, 1, jnp.bfloat16, config.quantization, on_cpu=False)
    weights = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        state_shardings(layout.mesh, abstract),
    )
    nothing = dict.fromkeys(("limit_bytes", "weights_bytes", "sampling_bytes", "reserve_bytes", "page_bytes", "max_request_tokens"), 0)
    capacity = Capacity(pages=PAGES, page_tokens=PAGE, **nothing)
    pool, transit, _ = abstract_arrays(config, layout, capacity, table, jnp.dtype(jnp.bfloat16))
    bucket = Bucket(ROWS, 1 if chunk else 0, chunk, table.table_pages[-1])
    with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):
        return lower_forward(graphdef, weights, pool, transit, ROWS, table, bucket, layout).compile(), pool


def found(devices, **fields) -> dict:
    program, pool = compiled(devices, **fields)
    text, memory = program.as_text(), program.memory_analysis()
    in_pool = f"{LAYERS},{PAGES},"
    entry = text[text.index("\nENTRY") :]
    made = [(kind, shape, dtype) for dtype, shape, kind in _MADE.findall(entry) if kind not in _HELD and not shape.startswith(in_pool)]
    sizes = {f"{kind} {dtype}[{shape}]": math.prod(map(int, shape.split(","))) if shape else 1 for kind, shape, dtype in made}
    return {
        "pool_bytes": pool_bytes(pool),
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "kernels": sum("paged_attention" in line and "custom-call(" in line for line in text.splitlines()),
        "sorts": len(re.findall(r" sort\(", text)),
        "largest": max(sizes.items(), key=lambda item: item[1]),
        "collectives": [[one.kind, one.group, one.bytes, times] for one, times in read_collectives(text).items()],
    }


if __name__ == "__main__":
    target = (CONFIGS / "targets" / "h200.txtpb").read_text()
    H200 = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x2x1").devices
    names = sys.argv[1:] or list(CASES)
    print(msgspec.json.encode({name: found(H200, **CASES[name]) for name in names}).decode())
