"""Scales and rounding, by AQT's quantizer: the one file that imports AQT (which is at its end of life; FACTS.md).

AQT's symmetric integers map the largest magnitude of a block to the outer edge of the last bucket (127.5 for int8, 7.5 for
int4), its e4m3 to 448, and round to nearest even; a block of zeros has the scale of a block of ones.
"""

import math

import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_quantizer

from novajax.planner.formats import scale_shape
from novajax.quant.formats import Kind
from novajax.quant.qtensor import DTYPES


def quantize(x: jax.Array, block: tuple[int, ...], kind: Kind) -> tuple[jax.Array, jax.Array]:
    """(values of x's shape, float32 scales of `scale_shape(x.shape, block)`): x is about values * scale, block by block.

    A scale that is not finite says that x is not. To be traced: also how activations are rounded inside a step.
    """
    counts = scale_shape(x.shape, block)
    whole = [count * by for count, by in zip(counts, block, strict=True)]
    padded = jnp.pad(x.astype(jnp.float32), [(0, to - size) for to, size in zip(whole, x.shape, strict=True)])
    split: list[int] = []
    shared: list[int] = []
    for count, by in zip(counts, block, strict=True):
        if count > 1 and by > 1:
            split.append(count)
        if by > 1:
            shared.append(len(split))
        split.append(count if by == 1 else by)
    quantizer = aqt_quantizer.quantizer_make("e4m3" if kind == "fp8" else {"int8": 8, "int4": 4}[kind])
    made, _ = quantizer.quant(padded.reshape(split), calibration_axes=shared)
    if made.qvalue is None or not made.scale or math.prod(made.scale[0].shape) != math.prod(counts):
        raise TypeError("AQT's quantizer returned no values or other scales than asked for")
    values = made.qvalue.astype(DTYPES[kind]).reshape(whole)
    return values[tuple(slice(size) for size in x.shape)], made.scale[0].reshape(counts)
