"""The product of activations with a QTensor.

The sum runs over the small values as they are stored, and scales are applied to its result. Where scales differ along a
summed dimension (groups of int4, experts that are summed) there is one small sum for each group, [groups, rows, ...] in
float32, then scaled and added up; rows go through in blocks, so that this never outgrows a float copy of the weight.

With int8 activations each token's row is rounded to int8 with a scale of its own (by AQT, like the weights) and the
sums are int8 x int8 -> int32, exact as long as fewer than 2^31 / 127^2 (133,000) elements are summed. A CPU has a fast form of that
for two rows or more, so one row goes with a row of zeros.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from novajax.core.errors import ConfigError
from novajax.planner.formats import scale_shape
from novajax.quant.aqt import quantize
from novajax.quant.qtensor import QTensor


def dot(left: str, right: str, result: str, x: jax.Array, weight: QTensor) -> jax.Array:
    """float32 of einsum(f"{left},{right}->{result}"); x has one letter that the weight lacks, the rows.

    Raises ConfigError for a piece of a weight that ends inside a group.
    """
    if weight.scale.shape != scale_shape(weight.shape, weight.block):
        raise ConfigError(f"a device's part {list(weight.shape)} of a weight has parts of groups of {list(weight.block)}: use other groups")
    (row,) = (letter for letter in left if letter not in right)
    summed = [letter for letter in right if letter in left]
    sums = math.prod(weight.shape[right.index(letter)] for letter in summed)
    groups = math.prod(weight.scale.shape[right.index(letter)] for letter in summed)
    x = jnp.moveaxis(x, left.index(row), 0)
    letters = row + left.replace(row, "")
    rows, most = x.shape[0], max(2, sums // groups)
    if rows == 1 and weight.format.activations == "int8":
        out = _block(letters, right, jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1)), weight)[:1]
    elif groups == 1 or rows <= most:
        out = _block(letters, right, x, weight)
    else:
        padded = jnp.pad(x, [(0, -rows % most)] + [(0, 0)] * (x.ndim - 1))
        out = lax.map(lambda part: _block(letters, right, part, weight), padded.reshape(-1, most, *x.shape[1:]))
        out = out.reshape(-1, *out.shape[2:])[:rows]
    found = row + "".join(letter for letter in right if letter not in summed)
    return jnp.transpose(out, [found.index(letter) for letter in result])


def _block(left: str, right: str, x: jax.Array, weight: QTensor) -> jax.Array:
    """float32 [rows, the weight's own letters]; `left` starts with the rows."""
    row_scale, values, scale = None, weight.values, weight.scale
    if weight.format.activations == "int8":
        x, row_scale = quantize(x, (1, *x.shape[1:]), "int8")
    values = values.astype(x.dtype)
    counts = dict(zip(right, zip(scale.shape, weight.block, strict=True), strict=True))
    groups = {letter: counts[letter] for letter in right if letter in left and counts[letter][0] > 1}
    x, x_letters = _split(left, x, groups)
    values, letters = _split(right, values, groups)
    batch = [letter for letter in letters if letter.isupper()]
    summed = [letter for letter in letters if letter in x_letters and letter not in batch]
    shared = (tuple(map(x_letters.index, summed)), tuple(map(letters.index, summed)))
    dimensions = (shared, (tuple(map(x_letters.index, batch)), tuple(map(letters.index, batch))))
    exact = x.dtype == jnp.float32
    out = lax.dot_general(
        x,
        values,
        dimensions,
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.int32 if row_scale is not None else jnp.float32,
    )  # [groups, rows, own]
    own = [letter for letter in right if letter not in left]
    scale = scale.transpose(
        [right.index(letter) for letter in [name.lower() for name in batch] + own + [n for n in right if n in left and n not in groups]]
    )
    scale = scale.reshape(*(groups[name.lower()][0] for name in batch), 1, *(weight.shape[right.index(letter)] for letter in own))
    out = out.astype(jnp.float32) * scale
    out = jnp.sum(out, axis=tuple(range(len(batch)))) if batch else out
    return out if row_scale is None else out * row_scale.reshape(-1, *[1] * len(own))


def _split(letters: str, array: jax.Array, groups: dict[str, tuple[int, int]]) -> tuple[jax.Array, list[str]]:
    """The array with each dimension of `groups` as (number of groups, group), the number's letter in upper case; a short last group
    is filled up with zeros."""
    shape: list[int] = []
    names: list[str] = []
    padding = []
    for letter, size in zip(letters, array.shape, strict=True):
        if letter not in groups:
            shape, names, padding = [*shape, size], [*names, letter], [*padding, (0, 0)]
            continue
        count, by = groups[letter]
        padding.append((0, count * by - size))
        shape += [count, by] if by > 1 else [count]
        names += [letter.upper(), letter] if by > 1 else [letter.upper()]
    return (jnp.pad(array, padding) if any(end for _, end in padding) else array).reshape(shape), names
