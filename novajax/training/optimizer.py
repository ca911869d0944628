"""The optimizer of a recipe, with optax: Muon on the layers' matrices, Adam on the rest, clipped, with a warm-up/stable/decay rate."""

from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from novajax.models.decoder import Decoder
from novajax.training.recipe import OptimizerRecipe


def rate(recipe: OptimizerRecipe, steps: int, peak: float) -> optax.Schedule:
    """The learning rate by step; `peak` is where it stays."""
    stable_from, decay_from = recipe.warmup_steps, recipe.warmup_steps + recipe.stable_steps
    tail_from = decay_from + recipe.decay_steps
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, recipe.warmup_steps),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, peak * recipe.final_ratio, recipe.decay_steps),
            optax.linear_schedule(peak * recipe.tail_ratio, 0.0, max(1, steps - tail_from)),
        ],
        [stable_from, decay_from, tail_from],
    )


def optimizer(recipe: OptimizerRecipe, steps: int, model: Decoder) -> optax.GradientTransformation:
    """A transformation over the model's `nnx.Param` state."""
    numbers = matrix_axes(nnx.state(model, nnx.Param))
    update = optax.contrib.muon(
        rate(recipe, steps, recipe.learning_rate),
        weight_decay=recipe.weight_decay,
        adam_b2=0.98,
        adam_learning_rate=rate(recipe, steps, recipe.adam_learning_rate),
        muon_weight_dimension_numbers=lambda _: numbers,
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(recipe.clip), update)


def matrix_axes(params: nnx.State) -> Any:
    """For each parameter how its axes form one matrix (inputs, outputs), or None where it is a vector or an embedding.

    Read from the logical axis names: a layer's matrix has `embed` at one end and the rest at the other.
    """

    def of(param: nnx.Param) -> Any:
        axes = param.get_metadata()["axes"]
        if len(axes) < 2 or "vocab" in axes:
            return None
        rest = tuple(range(1, len(axes)))
        return (
            MuonDimensionNumbers((0,), rest) if axes[0] == "embed" else MuonDimensionNumbers(tuple(i - 1 for i in rest), (len(axes) - 1,))
        )

    variables = jax.tree.map(of, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return variables


def scale_embedding(model: Decoder, std: float) -> None:
    """Random embedding rows to the standard deviation `std`."""
    values = model.embed.get_value()
    model.embed.set_value(values * (std / values.std()))
