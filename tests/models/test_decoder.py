"""The decoder's own promises: one spec tree, axis names everywhere, the two formulations of experts agree, windows and packing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from flax import nnx

from novajax.models.attention import dense_causal
from novajax.models.config import Dense, Experts, LayerKind, ModelConfig, Rope
from novajax.models.decoder import abstract_model, init_model, parameter_count
from novajax.models.moe import MoE

NAMES = {"embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "experts", None}


def config(mlp: Dense | Experts, *, window: int | None = None, **changes: object) -> ModelConfig:
    values = dict(vocab=50, embed=16, heads=4, kv_heads=2, head_dim=8, max_context_tokens=64, norm_eps=1e-6, activation="silu")
    kinds = (LayerKind(Rope(1e4), mlp, window),) * 2
    return ModelConfig(**{**values, "family": "test", "layers": kinds, "attention_scale": 8**-0.5, **changes})  # pyright: ignore[reportArgumentType]


EXPERTS = Experts(12, experts=6, per_token=2, renormalize=True)
RICH: dict[str, Any] = dict(qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, post_norms=True, norm_offset=1.0)


def test_abstract_model_declares_what_init_makes():
    cfg = config(Dense(24), **RICH)
    cfg = msgspec.structs.replace(cfg, layers=(cfg.layers[0], msgspec.structs.replace(cfg.layers[0], mlp=EXPERTS)))
    declared = dict(nnx.to_flat_state(nnx.state(abstract_model(cfg))))
    narrow = dict(nnx.to_flat_state(nnx.state(abstract_model(cfg, jnp.bfloat16))))
    made = dict(nnx.to_flat_state(nnx.state(init_model(cfg, 0))))
    assert declared.keys() == made.keys()
    for path, variable in declared.items():
        assert isinstance(variable.get_value(), jax.ShapeDtypeStruct)
        assert (variable.shape, variable.dtype) == (made[path].shape, made[path].dtype) == (narrow[path].shape, jnp.float32)
        assert narrow[path].dtype == jnp.bfloat16
        axes = variable.get_metadata("axes")
        assert len(axes) == len(variable.shape)
        assert set(axes) <= NAMES
    assert parameter_count(cfg) == sum(variable.get_value().size for variable in made.values())


def compiled(cfg: ModelConfig, batch: int = 1, dtype: jnp.dtype = jnp.float32) -> Callable[[jax.Array], np.ndarray]:
    """tokens [B * S] -> logits [B * S, V] of a model with the weights of seed 0."""
    graph, state = nnx.split(init_model(cfg, 0))
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)

    @jax.jit
    def run(state: nnx.State, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        hidden, _ = model(tokens, jnp.arange(tokens.shape[0]) % (tokens.shape[0] // batch), dense_causal(cfg, batch), None)
        assert hidden.dtype == dtype
        return model.logits(hidden)

    return lambda tokens: np.asarray(run(state, tokens))


def test_packed_rows_do_not_see_each_other_nor_the_future():
    forward = compiled(config(Dense(24)), batch=2)
    row = jnp.arange(12, dtype=jnp.int32) * 7 % 50
    twice, beside, changed = (forward(jnp.concatenate(rows)) for rows in ([row, row], [row, row[::-1]], [row, row.at[8:].set(3)]))
    np.testing.assert_array_equal(beside[:12], twice[:12])
    np.testing.assert_allclose(twice[12:], twice[:12], atol=1e-5)
    np.testing.assert_allclose(changed[12:20], twice[12:20], atol=1e-5)
    assert np.abs(changed[20:] - twice[20:]).max() > 0.1


def test_window_reaches_as_far_as_it_says():
    """Two layers of window 3 see 1 + 2 * 2 tokens: the fifth token back matters no more, the fourth does."""
    forward = compiled(config(Dense(24), window=3))
    row = jnp.arange(10, dtype=jnp.int32)
    last = forward(row)[-1]
    np.testing.assert_array_equal(forward(row.at[4].set(40))[-1], last)
    assert np.abs(forward(row.at[5].set(40))[-1] - last).max() > 1e-4


def test_bfloat16_is_close_and_its_logits_are_float32():
    cfg = config(Dense(24), **RICH)
    row = jnp.arange(12, dtype=jnp.int32)
    exact, rounded = compiled(cfg)(row), compiled(cfg, dtype=jnp.bfloat16)(row)
    assert rounded.dtype == np.float32
    assert np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("tokens", [1, 300])
def test_formulations_of_experts_agree_and_nothing_is_dropped(tokens: int):
    cfg = config(EXPERTS)
    moe = MoE(cfg, EXPERTS, nnx.Rngs(1), jnp.float32)
    x_TD = jax.random.normal(jax.random.key(2), (tokens, cfg.embed))
    x_TD = x_TD.at[tokens // 2 :].set(x_TD[0])  # half the tokens crowd on one pair of experts
    route = jax.jit(moe.route)(x_TD)
    weights = [matrix.get_value() for matrix in (moe.gate, moe.up, moe.down)]
    blocks, everywhere = (np.asarray(jax.jit(form)(x_TD, *route, *weights)) for form in (moe.by_blocks, moe.by_all))
    np.testing.assert_allclose(blocks, everywhere, atol=2e-5)
    np.testing.assert_allclose(blocks[-1], blocks[0], atol=1e-6)


def test_gradients_flow_through_experts():
    cfg = config(EXPERTS)
    moe = MoE(cfg, EXPERTS, nnx.Rngs(1), jnp.float32)
    x_TD = jax.random.normal(jax.random.key(2), (5, cfg.embed))
    graph, state = nnx.split(moe)

    def loss(state: nnx.State, blocks: bool) -> jax.Array:
        model = nnx.merge(graph, state)
        form = model.by_blocks if blocks else model.by_all
        weights = [matrix.get_value() for matrix in (model.gate, model.up, model.down)]
        return jnp.sum(jnp.square(form(x_TD, *model.route(x_TD), *weights)))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    by_blocks, by_all = (gradient(state, blocks) for blocks in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), by_blocks, by_all)
