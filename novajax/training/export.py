"""A trained decoder as a Hugging Face directory: the family's key map read backwards, weights in bfloat16 safetensors."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from novajax.core.errors import WeightsError
from novajax.models.decoder import Decoder
from novajax.models.families.keys import Mapping
from novajax.models.families.registry import key_map


def foreign_tensors(model: Decoder, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every parameter under its foreign name, in its foreign shape and the model's dtype.

    Raises WeightsError for a parameter that the family's key map does not name.
    """
    rules = [rule for rule in key_map(config, model.cfg) if rule.path]
    tensors = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        layer = next((part for part in path if isinstance(part, int)), None)
        ours = "/".join(str(part) for part in path)
        rule = next((rule for rule in rules if rule.path.format(layer=layer) == ours), None)
        if rule is None:
            raise WeightsError(f"the parameter {ours} has no name in the family {model.cfg.family!r}")
        tensors[_name(rule, layer)] = _foreign(rule.axes, np.asarray(param.get_value()))
    return tensors


def save_checkpoint(model: Decoder, config: dict[str, Any], directory: Path) -> None:
    """config.json and model.safetensors (bfloat16)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: np.ascontiguousarray(values.astype(jnp.bfloat16)) for name, values in foreign_tensors(model, config).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # the writer's own choice is for its user only


def _name(rule: Mapping, layer: int | None) -> str:
    named = re.sub(r"\(\?P<layer>[^)]*\)", str(layer), rule.pattern)
    return named.replace("\\.", ".")


def _foreign(axes: str, values: np.ndarray) -> np.ndarray:
    left, right = axes.split("->")
    groups = [found.split() for found in (merged or single for merged, single in re.findall(r"\(([^)]*)\)|(\S+)", left))]
    ours = right.split()
    order = [ours.index(letter) for group in groups for letter in group]
    shape = [int(np.prod([values.shape[ours.index(letter)] for letter in group])) for group in groups]
    return values.transpose(order).reshape(shape)
