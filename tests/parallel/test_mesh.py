"""Meshes and rules refuse what cannot be cut, with the numbers; a cut model computes what a whole one does."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec

from novajax.core.errors import CapacityError, ConfigError
from novajax.parallel.axes import AXES, split_tensor_parallel
from novajax.parallel.mesh import make_mesh
from novajax.parallel.rules import partition_spec


def fake_mesh(**sizes: int) -> Any:
    return SimpleNamespace(shape=dict.fromkeys(AXES, 1) | sizes)


def test_mesh_has_five_auto_axes_and_counts_devices():
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    with pytest.raises(CapacityError, match="tensor 4096 needs 4096 devices"):
        make_mesh(tensor=4096)
    with pytest.raises(ConfigError, match="query=0"):
        make_mesh(query=0)


@pytest.mark.parametrize(
    ("total", "kv_heads", "expected"), [(8, 2, (2, 4)), (8, 8, (8, 1)), (4, 8, (4, 1)), (1, 3, (1, 1)), (3, 3, (3, 1))]
)
def test_split_tensor_parallel(total: int, kv_heads: int, expected: tuple[int, int]):
    assert split_tensor_parallel(total, kv_heads) == expected


def test_split_tensor_parallel_refuses():
    with pytest.raises(ConfigError, match="tensor_parallel=4 with 6 KV heads"):
        split_tensor_parallel(4, 6)


def test_rules():
    mesh = fake_mesh(tensor=2, query=4)
    assert partition_spec(mesh, ("embed", "heads", "head_dim"), (64, 8, 8)) == PartitionSpec(None, ("tensor", "query"), None)
    assert partition_spec(mesh, ("embed", "kv_heads", "head_dim"), (64, 2, 8)) == PartitionSpec(None, ("tensor",), None)
    assert partition_spec(mesh, (None, "mlp"), (3, 8)) == PartitionSpec(None, ("tensor", "query"))
    with pytest.raises(ConfigError, match=r"heads=9 of .* does not divide by 8 \(tensor 2 x query 4\)"):
        partition_spec(mesh, ("embed", "heads", "head_dim"), (64, 9, 8))
    with pytest.raises(ConfigError, match="'tensor' would cut both 'mlp' and 'heads'"):
        partition_spec(mesh, ("mlp", "heads"), (8, 8))
    with pytest.raises(ConfigError, match="'typo' has no rule"):
        partition_spec(mesh, ("typo",), (8,))
    with pytest.raises(ConfigError, match="1 axis names"):
        partition_spec(mesh, ("embed",), (8, 8))


CUT_FORWARD = """
import jax, jax.numpy as jnp, numpy as np, re
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from flax import nnx
from novajax.core.errors import ConfigError
from novajax.models.attention import dense_causal
from novajax.models.config import Dense, Experts, LayerKind, ModelConfig, Rope
from novajax.models.decoder import init_model
from novajax.parallel.mesh import make_mesh
from novajax.parallel.rules import state_shardings

def config(kv_heads, mlp):
    return ModelConfig(family="test", layers=(LayerKind(Rope(1e4), mlp),) * 2, vocab=64, embed=32, heads=8, kv_heads=kv_heads, head_dim=8,
        max_context_tokens=64, norm_eps=1e-6, activation="silu", attention_scale=8**-0.5, qk_norm=True)

tokens = jnp.arange(16, dtype=jnp.int32) * 3 % 64
for name, cfg in {"dense": config(2, Dense(64)), "experts": config(2, Experts(16, experts=4, per_token=2, renormalize=True))}.items():
    graph, state = nnx.split(init_model(cfg, 0))
    def forward(state):
        model = nnx.merge(graph, state)
        hidden, _ = model(tokens, jnp.arange(16), dense_causal(cfg, 1), None)
        return model.logits(hidden)
    whole = np.asarray(jax.jit(forward)(state))
    mesh = make_mesh(tensor=2, query=4)
    cut = jax.device_put(state, state_shardings(mesh, state))
    q = cut["layers"][0]["attention"]["q"].get_value()
    assert q.addressable_shards[0].data.shape == (32, 1, 8), q.addressable_shards[0].data.shape
    compiled = jax.jit(forward).lower(cut).compile()
    error = np.abs(np.asarray(compiled(cut)) - whole).max()
    assert error < 1e-5, error
    ops = re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\\(", compiled.as_text())
    print(name, {op: ops.count(op) for op in sorted(set(ops))})
try:
    state_shardings(make_mesh(tensor=8), state)
except ConfigError as error:
    print(error.message)
"""


def test_cut_forward_equals_whole():
    """Two all-reduces a layer and one for the embedding rows; anything more is a resharding that crept in."""
    done = subprocess.run([sys.executable, "-c", CUT_FORWARD], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    dense, experts, refusal = done.stdout.splitlines()
    assert dense == "dense {'all-reduce': 5}"
    assert experts == "experts {'all-reduce': 5}"
    assert refusal.startswith("layers/0/attention/k: kv_heads=2")
