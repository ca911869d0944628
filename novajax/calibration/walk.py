"""Runs a decoder layer by layer over calibration rows and gathers what each matrix is multiplied by.

Invariants: a layer is the model's own `Layer`, compiled once for each kind of layer; activations of all rows are kept for one
depth at a time. Experts' matrices are not watched: which rows meet them depends on the router.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx

from novajax.calibration.loss import Graph
from novajax.models.attention import dense_causal
from novajax.models.config import Experts, LayerKind, ModelConfig
from novajax.models.decoder import Layer
from novajax.models.rope import angles
from novajax.models.stages import Path
from novajax.quant.watched import Watched
from novajax.weights.load import LoadedModel

ATTENTION_IN = (("attention", "q"), ("attention", "k"), ("attention", "v"))
ATTENTION_OUT = (("attention", "o"),)
MLP_IN = (("mlp", "gate"), ("mlp", "up"))
MLP_OUT = (("mlp", "down"),)


class Statistics(msgspec.Struct, frozen=True):
    """Of a matrix's inputs, over all tokens."""

    moment: np.ndarray
    """Mean of x x^T, float64[inputs, inputs]."""
    largest: np.ndarray
    """Of |x|, float32[inputs]."""


def turns(kind: LayerKind) -> tuple[tuple[Path, ...], ...]:
    """The matrices of a layer by the order in which their inputs are known; those of one turn have the same inputs."""
    return (ATTENTION_IN, ATTENTION_OUT) if isinstance(kind.mlp, Experts) else (ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT)


class Walk:
    """Stands before one layer; `watch` looks at it, `step` goes through it."""

    def __init__(self, loaded: LoadedModel, state: nnx.State, batches: Sequence[np.ndarray]):
        """`state`: weights of the model `loaded`, its embedding as the walk shall see it. `batches`: int32[rows, row_tokens]."""
        self._graph, self._cfg, self._shape, self._layer = loaded.graphdef, loaded.config, batches[0].shape, 0
        self._inputs = [_embedded(self._graph, state, tokens.reshape(-1)) for tokens in batches]

    def watch(self, layer: nnx.State, names: Sequence[Path]) -> dict[Path, Statistics]:
        """Statistics of the matrices `names` of this layer with the weights `layer`."""
        found = [_watched(self._kind, self._cfg, self._shape, tuple(names), layer, x_TD) for x_TD in self._inputs]
        return {name: self._joined([one[name] for one in found]) for name in names}

    def step(self, layer: nnx.State) -> None:
        """Goes through this layer with the weights `layer`."""
        self._inputs = [_through(self._kind, self._cfg, self._shape, layer, x_TD) for x_TD in self._inputs]
        self._layer += 1

    def hidden(self, state: nnx.State) -> Statistics:
        """Behind the last layer and the final norm: the inputs of the head."""
        return self._joined([_behind(self._graph, state, x_TD) for x_TD in self._inputs])

    def _joined(self, parts: list[tuple[jax.Array, jax.Array]]) -> Statistics:
        tokens = len(parts) * self._shape[0] * self._shape[1]
        moment = sum(np.asarray(moment, np.float64) for moment, _ in parts) / tokens
        return Statistics(np.asarray(moment), np.max([np.asarray(largest) for _, largest in parts], axis=0))

    @property
    def _kind(self) -> LayerKind:
        return self._cfg.layers[self._layer]


def _statistics(x_TI: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_TI = x_TI.astype(jnp.float32)
    return jnp.matmul(x_TI.T, x_TI, precision=jax.lax.Precision.HIGHEST), jnp.max(jnp.abs(x_TI), axis=0)


@partial(jax.jit, static_argnums=0)
def _embedded(graph: Graph, state: nnx.State, tokens_T: jax.Array) -> jax.Array:
    model: Any = nnx.merge(graph, state)
    return model.scale(model.rows(tokens_T))


@partial(jax.jit, static_argnums=0)
def _behind(graph: Graph, state: nnx.State, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    model: Any = nnx.merge(graph, state)
    return _statistics(model.final_norm(x_TD))


def _run(kind: LayerKind, cfg: ModelConfig, shape: tuple[int, int], layer: nnx.State, x_TD: jax.Array) -> jax.Array:
    alone = msgspec.structs.replace(cfg, layers=(kind,))
    graph = nnx.graphdef(nnx.eval_shape(lambda: Layer(cfg, kind, nnx.Rngs(0), x_TD.dtype)))
    turn = angles(kind.rope, cfg.head_dim, jnp.tile(jnp.arange(shape[1]), shape[0]))
    model: Any = nnx.merge(graph, layer)
    return model(0, x_TD, turn, dense_causal(alone, shape[0]), None)[0]


_through = partial(jax.jit, static_argnums=(0, 1, 2))(_run)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _watched(
    kind: LayerKind, cfg: ModelConfig, shape: tuple[int, int], names: tuple[Path, ...], layer: nnx.State, x_TD: jax.Array
) -> dict[Path, tuple[jax.Array, jax.Array]]:
    found: dict[Path, tuple[jax.Array, jax.Array]] = {}

    def watched(name: Path, variable: nnx.Variable) -> nnx.Variable:
        def tell(x_TI: jax.Array) -> None:
            found[name] = _statistics(x_TI)

        return variable.replace(Watched(variable.get_value(), tell)) if name in names else variable

    _run(kind, cfg, shape, nnx.from_flat_state([(name, watched(name, one)) for name, one in nnx.to_flat_state(layer)]), x_TD)
    return found
