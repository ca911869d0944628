"""The parameter tree with a QTensor in place of each array that a profile quantizes: what loading, sharding and counting read."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from novajax.core.errors import ConfigError
from novajax.models.config import ModelConfig
from novajax.models.sizes import ROLES
from novajax.models.stages import staged_model
from novajax.planner.formats import profiles
from novajax.quant.profiles import Rules, format_of, rules_of
from novajax.quant.qtensor import abstract


def quantized_model(cfg: ModelConfig, stages: int, dtype: Any, quantization: str, *, on_cpu: bool) -> tuple[nnx.GraphDef[Any], nnx.State]:
    """`models.stages.staged_model` with the abstract weights of a profile or format; "": none.

    Raises ConfigError for an unknown name, and for a profile that wants float32 parts of a model in bfloat16.
    """
    graphdef, state = staged_model(cfg, stages, dtype)
    if not quantization:
        return graphdef, state
    named = profiles().get(quantization)
    wide = [part for part in ("embedding", "norm", "head") if named is not None and getattr(named, part) == "float32"]
    if wide and jnp.dtype(dtype) != jnp.float32:
        raise ConfigError(f"profile {quantization} keeps {', '.join(wide)} in float32; use dtype=float32", param="quantization")
    return graphdef, quantized_state(state, rules_of(quantization, tied=cfg.tied_embedding), on_cpu=on_cpu)


def quantized_state(state: nnx.State, rules: Rules, *, on_cpu: bool) -> nnx.State:
    """The abstract `state` by `rules`. Raises ConfigError for a parameter that no rule matches or that is no matrix."""
    made = []
    for path, variable in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        form = format_of(rules, name, on_cpu=on_cpu)
        if form is not None:
            if str(path[-1]) not in ROLES:
                raise ConfigError(f"the precision profile makes {name} {form.name}; only matrices can be quantized", param="quantization")
            _, summed = ROLES[str(path[-1])]
            contracted = tuple(i for i, axis in enumerate(variable.get_metadata("axes")) if axis in summed)
            variable = variable.replace(abstract(tuple(variable.shape), contracted, form))
        made.append((path, variable))
    return nnx.from_flat_state(made)
