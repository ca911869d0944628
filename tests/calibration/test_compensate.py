"""Compensation pays where inputs are correlated, and what it makes is the stored format."""

import jax.numpy as jnp
import numpy as np
import pytest

from novajax.calibration.matrices import Matrix
from novajax.quant.formats import parse
from novajax.quant.qtensor import dequantized

CASES = {
    "embed to heads": ((96, 3, 8), (0,)),
    "heads to embed": ((6, 16, 40), (0, 1)),
    "a short last group": ((172, 64), (0,)),
    "more than a run": ((300, 20), (0,)),
}


@pytest.mark.parametrize("form", ["int4-32", "int4-128"])
@pytest.mark.parametrize("case", CASES)
def test_products_with_correlated_inputs_change_less(case, form):
    shape, contracted = CASES[case]
    random = np.random.default_rng(0)
    inputs = int(np.prod([shape[axis] for axis in contracted]))
    weight_IO = random.normal(size=(inputs, int(np.prod(shape)) // inputs)).astype(np.float32)
    x_TI = (random.normal(size=(512, 8)) @ random.normal(size=(8, inputs)) + 0.3 * random.normal(size=(512, inputs))).astype(np.float32)
    weight = jnp.asarray(weight_IO.reshape(shape))
    matrix = Matrix(("layers", 0, "mlp", "up"), shape, contracted)
    made = matrix.rounded(weight, parse(form), (x_TI.T @ x_TI / len(x_TI)).astype(np.float64))
    plain = matrix.plain(weight, parse(form))
    for part, same in zip((made.values, made.scale), (plain.values, plain.scale), strict=True):
        assert part.shape == same.shape
        assert part.dtype == same.dtype
    errors = [np.square(x_TI @ (np.asarray(dequantized(one)).reshape(weight_IO.shape) - weight_IO)).mean() for one in (made, plain)]
    assert errors[0] < 0.4 * errors[1]


def test_zeros_and_inputs_that_never_occur():
    weight = jnp.zeros((64, 4)).at[:, 1].set(1.0).at[:32, 2].set(-3.0)
    made = Matrix(("head",), (64, 4), (0,)).rounded(weight, parse("int4-32"), np.zeros((64, 64)))
    np.testing.assert_allclose(dequantized(made), weight, atol=0.05)
    assert (np.asarray(made.scale) > 0).all()
