"""What rounding costs: the Kullback-Leibler divergence of the next token's distribution, perplexity and agreement, row by row.

Invariants: the unrounded model is scored on the same rows, so differences are paired; of it only the hidden states behind its last
norm are kept, and its logits are made again from them, so that memory grows by D a token and not by V. Sums are float32 within
a row and float64 over rows.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx

from novajax.models.attention import dense_causal
from novajax.models.decoder import Decoder

Z95 = 1.959964
"""Of a two-sided interval of 95 % under the normal distribution."""
Graph = nnx.GraphDef[Decoder]


class Scores(msgspec.Struct, frozen=True):
    """Means over the predicted tokens of each row, float64[rows]."""

    divergence: np.ndarray
    """KL(unrounded || rounded), nats a token."""
    surprise: np.ndarray
    """Nats a token; exp of its mean is the perplexity."""
    surprise_unrounded: np.ndarray
    agreement: np.ndarray
    """Share of tokens with the same most likely one."""


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A rounded model beside the unrounded one: means, and half the width of their 95 % intervals over rows."""

    divergence: float
    divergence_spread: float
    perplexity: float
    change: float
    """Of perplexity, relative."""
    change_low: float
    change_high: float
    agreement: float
    agreement_spread: float


class Measure:
    """The unrounded model on some rows; scores other weights of the same model against it."""

    def __init__(self, graph: Graph, state: nnx.State, batches: Sequence[np.ndarray]):
        """`batches`: int32[rows, row_tokens]."""
        self.graph, self.state, self.batches = graph, state, tuple(batches)
        self.hidden = [hidden(graph, state, jnp.asarray(tokens)) for tokens in self.batches]

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(batch.size for batch in self.batches)

    def scores(self, state: nnx.State) -> Scores:
        """Of the weights `state`, which may hold QTensors."""
        pending = [_score(self.graph, self.state, kept, state, tokens) for kept, tokens in zip(self.hidden, self.batches, strict=True)]
        rows = [np.asarray(part, np.float64) for part in pending]
        return Scores(*np.concatenate(rows, axis=1))

    def loss(self, state: nnx.State) -> Loss:
        return summary(self.scores(state))

    def divergence(self, state: nnx.State) -> float:
        """Mean nats a token."""
        return float(self.scores(state).divergence.mean())


def summary(scores: Scores) -> Loss:
    """Means with normal intervals over rows."""
    change = scores.surprise - scores.surprise_unrounded
    mean, spread = float(change.mean()), _spread(change)
    return Loss(
        divergence=float(scores.divergence.mean()),
        divergence_spread=_spread(scores.divergence),
        perplexity=math.exp(scores.surprise.mean()),
        change=math.expm1(mean),
        change_low=math.expm1(mean - spread),
        change_high=math.expm1(mean + spread),
        agreement=float(scores.agreement.mean()),
        agreement_spread=_spread(scores.agreement),
    )


def _spread(rows: np.ndarray) -> float:
    return Z95 * float(rows.std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else math.inf


def hidden_of(model: Decoder, tokens_BS: jax.Array) -> jax.Array:
    """Behind the final norm, [B * S, D]."""
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    return model(tokens_BS.reshape(-1), positions_BS.reshape(-1), dense_causal(model.cfg, tokens_BS.shape[0]), None)[0]


@partial(jax.jit, static_argnums=0)
def hidden(graph: Graph, state: nnx.State, tokens_BS: jax.Array) -> jax.Array:
    return hidden_of(nnx.merge(graph, state), tokens_BS)


@partial(jax.jit, static_argnums=0)
def _score(graph: Graph, unrounded: nnx.State, kept_TD: jax.Array, state: nnx.State, tokens_BS: jax.Array) -> jax.Array:
    """[4, B] in the order of `Scores`."""
    model: Any = nnx.merge(graph, state)
    logits_TV = model.logits(hidden_of(model, tokens_BS))
    want_TV = nnx.merge(graph, unrounded).logits(kept_TD)
    shape = (*tokens_BS.shape, -1)
    got, want = (jax.nn.log_softmax(part, axis=-1).reshape(shape)[:, :-1] for part in (logits_TV, want_TV))
    divergence = jnp.sum(jnp.exp(want) * (want - got), axis=-1)
    targets = tokens_BS[:, 1:, None]
    surprise, surprise_unrounded = (-jnp.take_along_axis(part, targets, axis=-1)[..., 0] for part in (got, want))
    agreement = (jnp.argmax(got, axis=-1) == jnp.argmax(want, axis=-1)).astype(jnp.float32)
    return jnp.stack([part.mean(axis=1) for part in (divergence, surprise, surprise_unrounded, agreement)])
