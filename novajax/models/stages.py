"""The decoder as one pipeline stage runs it: the same module with a stage's number of layers, and every parameter of a layer
with a leading axis over the stages. With one stage it is the decoder itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
import msgspec
from flax import nnx

from novajax.models.config import ModelConfig
from novajax.models.decoder import abstract_model
from novajax.parallel.axes import pattern_period, slots_per_stage

Path = tuple[Any, ...]
"""Of a parameter in a state, e.g. ("layers", 3, "attention", "q")."""


def stage_config(cfg: ModelConfig, stages: int) -> ModelConfig:
    """One stage's layers, padding included. Raises ConfigError when the layers cannot be cut so (`parallel.pipeline`)."""
    if stages == 1:
        return cfg
    period = pattern_period(cfg.layers)
    return msgspec.structs.replace(cfg, layers=tuple(cfg.layers[slot % period] for slot in range(slots_per_stage(cfg.layers, stages))))


def staged_model(cfg: ModelConfig, stages: int, dtype: Any = jnp.float32) -> tuple[nnx.GraphDef[Any], nnx.State]:
    """(graphdef of one stage, abstract state of all stages): the run tree, whose "layers/<slot>/..." leaves are [stages, ...].

    Raises ConfigError as `stage_config` does.
    """
    graphdef, state = nnx.split(abstract_model(stage_config(cfg, stages), dtype))
    if stages == 1:
        return graphdef, state
    staged = []
    for path, variable in nnx.to_flat_state(state):
        if path[0] == "layers":
            whole = jax.ShapeDtypeStruct((stages, *variable.shape), variable.dtype)
            variable = variable.replace(whole, axes=("stage", *variable.get_metadata("axes")))
        staged.append((path, variable))
    return graphdef, nnx.from_flat_state(staged)


def is_staged(path: Path, stages: int) -> bool:
    """Whether the run tree's leaf at `path` has a stage axis."""
    return stages > 1 and path[0] == "layers"


def stage_places(cfg: ModelConfig, stages: int) -> dict[Path, tuple[Path, int]]:
    """For each prefix ("layers", layer) of the canonical tree its prefix ("layers", slot) in the run tree, and the stage. Empty for
    one stage, where the two trees are the same."""
    if stages == 1:
        return {}
    slots = slots_per_stage(cfg.layers, stages)
    places = {layer: divmod(layer, slots) for layer in range(len(cfg.layers))}
    return {("layers", layer): (("layers", slot), stage) for layer, (stage, slot) in places.items()}
