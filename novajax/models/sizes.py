"""Reads a model's sizes off the abstract module for the planner: each parameter's path, shape and axes, exactly as declared.

One layer of each kind is traced, however deep the model, so that 126 layers cost what one does.
"""

from typing import Any

import msgspec
from flax import nnx

from novajax.core.errors import ConfigError
from novajax.models.config import Experts, ModelConfig
from novajax.models.decoder import abstract_model
from novajax.planner.sizes import Array, Component, LayerSizes, ModelSizes

ROLES: dict[str, tuple[Component, frozenset[str]]] = {
    "embed": ("embedding", frozenset({"embed"})),
    "head": ("head", frozenset({"embed"})),
    "q": ("attention_qkv", frozenset({"embed"})),
    "k": ("attention_qkv", frozenset({"embed"})),
    "v": ("attention_qkv", frozenset({"embed"})),
    "o": ("attention_out", frozenset({"heads", "head_dim"})),
    "gate": ("mlp", frozenset({"embed"})),
    "up": ("mlp", frozenset({"embed"})),
    "down": ("mlp", frozenset({"mlp"})),
    "router": ("norm", frozenset({"embed"})),
}
"""By the parameter's name: its row in a precision profile, and the axes its multiplication sums over."""


def model_sizes(cfg: ModelConfig) -> ModelSizes:
    """Every array of the model. Raises ConfigError for a parameter that has no role here."""
    kinds = tuple(dict.fromkeys(cfg.layers))
    state = nnx.state(abstract_model(msgspec.structs.replace(cfg, layers=kinds)), nnx.Param)
    arrays: dict[Any, list[Array]] = {}
    for path, leaf in nnx.to_flat_state(state):
        layer = path[1] if path[0] == "layers" else None
        arrays.setdefault(layer, []).append(_array(path, leaf.shape, leaf.get_metadata("axes")))
    layers = []
    for index, kind in enumerate(kinds):
        experts = kind.mlp if isinstance(kind.mlp, Experts) else None
        routed = (experts.experts, experts.per_token) if experts else (1, 1)
        layers.append(LayerSizes(tuple(arrays[index]), kind.window, *routed))
    return ModelSizes(
        kinds=tuple(layers),
        layers=tuple(kinds.index(kind) for kind in cfg.layers),
        ends=tuple(arrays[None]),
        vocab=cfg.vocab,
        embed=cfg.embed,
        heads=cfg.heads,
        kv_heads=cfg.kv_heads,
        head_dim=cfg.head_dim,
        max_context_tokens=cfg.max_context_tokens,
    )


def _array(path: tuple[Any, ...], shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
    name, last = "/".join(map(str, path)), str(path[-1])
    if last == "scale" or last.endswith("_bias"):
        return Array(name, "norm", shape, axes, ())
    if last not in ROLES:
        raise ConfigError(f"parameter {name} has no role in the planner's table")
    component, _ = ROLES[last]
    return Array(name, component, shape, axes, summed_dimensions(last, axes))


def summed_dimensions(role: str, axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """The dimensions that the product by a matrix of that role sums over."""
    _, summed = ROLES[role]
    return tuple(i for i, axis in enumerate(axes) if axis in summed)
