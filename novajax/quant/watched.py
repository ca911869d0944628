"""A weight that tells what it is multiplied by: how calibration sees the inputs of every matrix without a second form of the model.

It stands where the array stood, inside one trace; what it tells are that trace's values.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Watched:
    """The array, and who is told of each product."""

    values: jax.Array
    tell: Callable[[jax.Array], None]
    """Given [rows, inputs], the inputs in the weight's own order of summed dimensions."""

    def met(self, left: str, right: str, x: jax.Array) -> jax.Array:
        """The array, after telling of the product of x with the letters `left` and this with the letters `right`."""
        (row,) = (letter for letter in left if letter not in right)
        summed = [letter for letter in right if letter in left]
        self.tell(jnp.transpose(x, [left.index(letter) for letter in (row, *summed)]).reshape(x.shape[left.index(row)], -1))
        return self.values
