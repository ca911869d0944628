"""What each matrix costs in each format: measured, one rounded at a time, and estimated from one pass of gradients.

The estimate. For targets y drawn from the model itself the score s = grad log p(y) has mean 0 given the tokens before, so over a row
the products of a small change d of the weights with the scores of different tokens do not correlate, and the Kullback-Leibler
divergence of a row is, to second order, half the mean of (d . sum of scores)^2: half of d's product with the Fisher information
(Amari 1998; true targets in place of drawn ones would give the empirical Fisher, which is another thing: Kunstner et al. 2019). One
backward pass over the rows serves every matrix and format, and errors that compensate each other count as such.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from novajax.calibration.loss import Graph, Measure, hidden_of
from novajax.calibration.matrices import replaced, restored, value
from novajax.calibration.rounding import Candidate
from novajax.models.stages import Path
from novajax.quant.qtensor import QTensor
from novajax.telemetry.progress import Report

Costs = dict[Path, np.ndarray]
"""KL in nats a token of each of a matrix's candidates."""


def measured(measure: Measure, candidates: Sequence[Candidate], progress: Report) -> tuple[Costs, Costs]:
    """(KL, relative change of perplexity) of each candidate alone."""
    divergence, change = {}, {}
    with progress(sum(len(one.rounded) for one in candidates), "formats", "measure each matrix alone") as shown:
        for one in candidates:
            shown.note(one.matrix.name)
            losses = []
            for rounded in one.rounded:
                losses.append(measure.loss(replaced(measure.state, {one.matrix.path: restored(rounded)})))
                shown.advance()
            divergence[one.matrix.path] = np.array([loss.divergence for loss in losses])
            change[one.matrix.path] = np.array([loss.change for loss in losses])
    return divergence, change


def estimated(measure: Measure, candidates: Sequence[Candidate], seed: int, progress: Report) -> Costs:
    """KL of each candidate alone, to second order, by one backward pass over the rows of `measure`."""
    rounded = {one.matrix.path: one.rounded for one in candidates}
    weights = {path: value(measure.state, path) for path in rounded}
    total: Any = None
    with progress(len(measure.batches), "batches", "estimate by gradients") as shown:
        for number, tokens_BS in enumerate(measure.batches):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), len(tokens_BS))
            part = _projections(measure.graph, measure.state, weights, rounded, tokens_BS, keys)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
            shown.advance()
    predicted = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in measure.batches)
    return {path: np.array(sums, np.float64) / (2 * predicted) for path, sums in (total or {}).items()}


@partial(jax.jit, static_argnums=0)
def _projections(
    graph: Graph,
    state: nnx.State,
    weights: dict[Path, jax.Array],
    rounded: dict[Path, tuple[QTensor, ...]],
    tokens_BS: jax.Array,
    keys: jax.Array,
) -> dict[Path, tuple[jax.Array, ...]]:
    """Sums over rows of (change . gradient of the row)^2, for each candidate."""

    def drawn(weights: dict[Path, jax.Array], tokens_S: jax.Array, key: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graph, replaced(state, weights))
        logits_SV = model.logits(hidden_of(model, tokens_S[None]))[:-1]
        targets_S = jax.random.categorical(key, jax.lax.stop_gradient(logits_SV))
        return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits_SV), targets_S[:, None], axis=-1))

    def row(inputs: tuple[jax.Array, jax.Array]) -> dict[Path, tuple[jax.Array, ...]]:
        gradients = jax.grad(drawn)(weights, *inputs)
        changes = {path: [restored(one) - weights[path] for one in each] for path, each in rounded.items()}
        return {path: tuple(jnp.vdot(gradients[path], change) ** 2 for change in each) for path, each in changes.items()}

    return jax.tree.map(partial(jnp.sum, axis=0), jax.lax.map(row, (tokens_BS, keys)))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(np.asarray(one)), _ranks(np.asarray(other)))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]
