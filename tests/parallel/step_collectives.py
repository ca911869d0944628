"""Run in a process of its own: compiles the step on meshes of 8 virtual devices and prints what it moves and what it holds.

One JSON line for each (model, mesh): collectives by kind for a decode step and for a step with prefill, and bytes of one
device. Nothing is loaded or run.
"""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec

from novajax.core.config import EngineConfig, MeshConfig
from novajax.engine.buckets import Bucket, make_table
from novajax.engine.build import abstract_arrays, device_bytes
from novajax.engine.capacity import plan_capacity
from novajax.engine.compiler import lower_forward
from novajax.engine.layout import Layout
from novajax.kv.pool import page_bytes
from novajax.models.stages import staged_model
from novajax.parallel.mesh import mesh_for
from novajax.parallel.rules import state_shardings
from novajax.planner.hlo import read_collectives
from novajax.weights.describe import describe


def look(model: Path, mesh: MeshConfig) -> dict:
    cfg = describe(model).config
    config = EngineConfig(model=str(model), mesh=mesh, max_rows=4 * mesh.data, page_tokens=8, chunk_tokens=16, max_context_tokens=64)
    layout = Layout(mesh_for(mesh, cfg.kv_heads, jax.devices()), cfg)
    graphdef, state = staged_model(cfg, layout.stages)
    shardings = state_shardings(layout.mesh, state)
    weights = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings)
    table = make_table(config, 64, on_cpu=True)
    one_page = page_bytes(layout.slots, cfg.kv_heads, 8, cfg.head_dim, jnp.float32) // layout.mesh.shape["tensor"]
    held = device_bytes(shardings, state)
    capacity = plan_capacity(config, cfg, table, limit_bytes=1 << 30, weights_bytes=held, page_bytes=one_page, itemsize=4)
    pool, transit, _ = abstract_arrays(config, layout, capacity, table, jnp.dtype(jnp.float32))
    kinds, wide = {}, table.table_pages[-1]
    for name, prefill in (("decode", (0, 0)), ("prefill", table.prefill[-1])):
        bucket = Bucket(table.decode_rows[-1], *prefill, wide)
        lowered = lower_forward(graphdef, weights, pool, transit, config.max_rows, table, bucket, layout)
        counts: Counter[str] = Counter()
        for found, times in read_collectives(lowered.compile().as_text()).items():
            counts[found.kind] += times
        kinds[name] = dict(sorted(counts.items()))
    pool_bytes = sum(math.prod(part.sharding.shard_shape(part.shape)) * part.dtype.itemsize for part in jax.tree.leaves(pool))
    return {
        "model": model.name,
        "mesh": {axis: size for axis, size in msgspec.to_builtins(mesh).items() if size > 1},
        "layers": len(cfg.layers),
        "slots": layout.slots,
        "weights_bytes": held,
        "kv_bytes_per_token": pool_bytes / (capacity.pages * capacity.page_tokens),
    } | kinds


jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
for asked in msgspec.json.decode(sys.argv[2], type=list[MeshConfig]):
    print(json.dumps(look(Path(sys.argv[1]), asked)), flush=True)
