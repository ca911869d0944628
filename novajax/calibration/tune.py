"""Learns a rounded model's scales from the unrounded one: whole numbers stay, the scales beside them move.

The objective is KL(unrounded || rounded) of the next token on calibration text (distillation: Hinton et al. 2015, arXiv 1503.02531), the
optimizer optax's Adam with a cosine schedule on the scales' logarithms, so that a scale keeps its sign and its order of magnitude.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from novajax.calibration.loss import Graph, Measure, hidden_of
from novajax.calibration.matrices import replaced, rounded_of
from novajax.models.stages import Path
from novajax.quant.qtensor import QTensor, dequantized
from novajax.telemetry.progress import Report

RATE = 3e-3
"""Of the logarithm of a scale, at first."""
Scales = dict[Path, jax.Array]


def tuned(measure: Measure, state: nnx.State, steps: int, progress: Report) -> nnx.State:
    """`state`, a rounding of the weights of `measure`, with its scales learned on the rows of `measure`, batch after batch."""
    rounded = rounded_of(state)
    if not rounded or not steps:
        return state
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    moves: Any = {path: jnp.zeros_like(one.scale) for path, one in rounded.items()}
    memory = optimizer.init(moves)
    with progress(steps, "steps", "learn scales") as shown:
        for step in range(steps):
            batch = step % len(measure.batches)
            inputs = (measure.state, measure.hidden[batch], state, measure.batches[batch])
            gradients = _gradients(measure.graph, moves, rounded, *inputs)
            updates, memory = optimizer.update(gradients, memory)
            moves = optax.apply_updates(moves, updates)
            shown.advance()
    return replaced(state, _moved(rounded, moves))


def _moved(rounded: dict[Path, QTensor], moves: Any) -> dict[Path, QTensor]:
    return {path: QTensor(one.values, one.scale * jnp.exp(moves[path]), one.block, one.format) for path, one in rounded.items()}


@partial(jax.jit, static_argnums=0)
def _gradients(
    graph: Graph,
    moves: Scales,
    rounded: dict[Path, QTensor],
    unrounded: nnx.State,
    kept_TD: jax.Array,
    state: nnx.State,
    tokens_BS: jax.Array,
) -> Scales:
    want_TV = jax.nn.log_softmax(nnx.merge(graph, unrounded).logits(kept_TD))

    def divergence(moves: Scales) -> jax.Array:
        restored = {path: dequantized(one) for path, one in _moved(rounded, moves).items()}
        model: Any = nnx.merge(graph, replaced(state, restored))
        got_TV = jax.nn.log_softmax(model.logits(hidden_of(model, tokens_BS)))
        return jnp.mean(jnp.sum(jnp.exp(want_TV) * (want_TV - got_TV), axis=-1))

    return jax.grad(divergence)(moves)
