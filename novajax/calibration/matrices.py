"""The parameters that a precision map is about, and how one of them is rounded.

Invariants: a matrix is any parameter that is multiplied in full, the embedding included; norms, biases and routers stay as they are. What
is rounded to 4 bits is compensated where the second moment of its inputs is known (`compensate`), else only clipped; other
formats are rounded to nearest.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx

from novajax.calibration.compensate import compensated
from novajax.models.sizes import ROLES, summed_dimensions
from novajax.models.stages import Path
from novajax.quant.aqt import quantize
from novajax.quant.formats import Format
from novajax.quant.qtensor import QTensor, abstract, dequantized, stored_bytes

_quantize = partial(jax.jit, static_argnames=("block", "kind"))(quantize)
restored = jax.jit(dequantized)


class Matrix(msgspec.Struct, frozen=True):
    """One of a model's matrices."""

    path: Path
    shape: tuple[int, ...]
    contracted: tuple[int, ...]

    @property
    def name(self) -> str:
        """As rules know it."""
        return "/".join(map(str, self.path))

    @property
    def component(self) -> str:
        """Its row in a precision profile."""
        return ROLES[str(self.path[-1])][0]

    def spec(self, form: Format) -> QTensor:
        """Abstract, in that format."""
        return abstract(self.shape, self.contracted, form)

    def bytes(self, form: Format | None) -> int:
        """In that format with its scales; None: float32."""
        if form is None:
            return stored_bytes(self.shape, jnp.float32)
        return sum(stored_bytes(part.shape, part.dtype) for part in jax.tree.leaves(self.spec(form)))

    def plain(self, weight: jax.Array, form: Format) -> QTensor:
        """Rounded to nearest."""
        spec = self.spec(form)
        values, scale = _quantize(weight, block=spec.block, kind=form.kind)
        return QTensor(values, scale, spec.block, form)

    def rounded(self, weight: jax.Array, form: Format, moment: np.ndarray | None) -> QTensor:
        """With the least error on inputs of that second moment."""
        if form.kind != "int4":
            return self.plain(weight, form)
        inputs = int(np.prod([self.shape[axis] for axis in self.contracted]))
        return compensated(weight, self.spec(form), self.contracted, np.eye(inputs) if moment is None else moment)


def matrices(state: nnx.State) -> tuple[Matrix, ...]:
    """All of a model's, in the order of its tree."""
    found = []
    for path, variable in nnx.to_flat_state(state):
        role = str(path[-1])
        if role in ROLES and ROLES[role][0] != "norm":
            found.append(Matrix(path, tuple(variable.shape), summed_dimensions(role, variable.get_metadata("axes"))))
    return tuple(found)


def replaced(state: nnx.State, values: Mapping[Path, jax.Array | QTensor]) -> nnx.State:
    """The state with other values at those paths."""
    return nnx.from_flat_state([(path, v.replace(values[path]) if path in values else v) for path, v in nnx.to_flat_state(state)])


def unpacked(state: nnx.State) -> nnx.State:
    """The state with float arrays in place of QTensors: what programs compiled for the unrounded model accept."""
    return replaced(state, {path: restored(one) for path, one in rounded_of(state).items()})


def rounded_of(state: nnx.State) -> dict[Path, QTensor]:
    """The QTensors that the state holds."""
    return {path: one.get_value() for path, one in nnx.to_flat_state(state) if isinstance(one.get_value(), QTensor)}


def value(state: nnx.State, path: Path) -> jax.Array:
    """What the parameter at `path` holds."""
    node: Any = state
    for part in path:
        node = node[part]
    return node.get_value()
