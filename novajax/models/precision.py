"""The parameter tree with a QTensor in place of each array that a profile quantizes: what loading, sharding and counting read."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from novajax.core.errors import ConfigError
from novajax.models.config import ModelConfig
from novajax.models.sizes import ROLES, summed_dimensions
from novajax.models.stages import Path, stage_places, staged_model
from novajax.planner.formats import profiles
from novajax.quant.packed import halved, packed
from novajax.quant.profile_file import SUFFIX, Rules, unused
from novajax.quant.profiles import format_of, rules_of
from novajax.quant.qtensor import abstract


def quantized_model(
    cfg: ModelConfig, stages: int, dtype: Any, quantization: str, *, on_cpu: bool, rules: Rules = ()
) -> tuple[nnx.GraphDef[Any], nnx.State]:
    """`models.stages.staged_model` with the abstract weights of a profile or format; "": none, or by the `rules` of a sealed checkpoint.

    Raises ConfigError for an unknown name, for a profile that wants float32 parts of a model in bfloat16, and for a profile file that
    is for other layers.
    """
    graphdef, state = staged_model(cfg, stages, dtype)
    if not quantization:
        return graphdef, quantized_state(state, rules, on_cpu=on_cpu, layers=_layers(cfg, stages)) if rules else state
    named = profiles().get(quantization)
    wide = [part for part in ("embedding", "norm", "head") if named is not None and getattr(named, part) == "float32"]
    if wide and jnp.dtype(dtype) != jnp.float32:
        raise ConfigError(f"profile {quantization} keeps {', '.join(wide)} in float32; use dtype=float32", param="quantization")
    rules, layers = rules_of(quantization, tied=cfg.tied_embedding), _layers(cfg, stages)
    names = [name for path, _ in nnx.to_flat_state(state) for name in _names(path, layers)]
    if quantization.endswith(SUFFIX) and (spare := unused(rules, names)):
        raise ConfigError(f"precision profile {quantization} is for another model: no parameter here is {spare[0]}", param="quantization")
    return graphdef, quantized_state(state, rules, on_cpu=on_cpu, layers=layers)


def quantized_state(state: nnx.State, rules: Rules, *, on_cpu: bool, layers: dict[Path, list[Path]] | None = None) -> nnx.State:
    """The abstract `state` by `rules`, which name layers of the whole model; `layers` are those stacked in each slot of a stage.

    Raises ConfigError for a parameter that no rule matches, that is no matrix, or whose stages differ.
    """
    made = []
    for path, variable in nnx.to_flat_state(state):
        names = _names(path, layers or {})
        name, forms = names[0], {format_of(rules, name, on_cpu=on_cpu) for name in names}
        if len(forms) > 1:
            raise ConfigError(f"the precision profile gives {' and '.join(names)} different formats; stages need one", param="quantization")
        (form,) = forms
        if form is not None:
            if str(path[-1]) not in ROLES:
                raise ConfigError(f"the precision profile makes {name} {form.name}; only matrices can be quantized", param="quantization")
            contracted = summed_dimensions(str(path[-1]), variable.get_metadata("axes"))
            variable = variable.replace(abstract(tuple(variable.shape), contracted, form))
        made.append((path, variable))
    return nnx.from_flat_state(made)


def native_state(cfg: ModelConfig, state: nnx.State) -> nnx.State:
    """The state of one device as a CPU's native kernels read it (`quant.packed`): every matrix but experts and an embedding that is only
    looked up, which stays rows. Arrays of float32 whose numbers are all bfloat16 are held as that."""
    made = []
    for path, variable in nnx.to_flat_state(state):
        role, axes = str(path[-1]), variable.get_metadata("axes")
        if role in ROLES and "experts" not in axes:
            held = halved(variable.get_value())
            multiplied = role != "embed" or cfg.tied_embedding
            variable = variable.replace(packed(held, summed_dimensions(role, axes)) if multiplied else held)
            jax.block_until_ready(jax.tree.leaves(variable))  # one after the other: each original is given up before the next
        made.append((path, variable))
    return nnx.from_flat_state(made)


def _layers(cfg: ModelConfig, stages: int) -> dict[Path, list[Path]]:
    """("layers", slot) -> the ("layers", layer) of all stages there."""
    found: dict[Path, list[Path]] = {}
    for layer, (slot, _) in stage_places(cfg, stages).items():
        found.setdefault(slot, []).append(layer)
    return found


def _names(path: Path, layers: dict[Path, list[Path]]) -> list[str]:
    """The names that rules know a parameter of the run tree by."""
    return ["/".join(map(str, (*layer, *path[2:]))) for layer in layers.get(path[:2], [path[:2]])]
