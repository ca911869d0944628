"""Products with quantized weights: what they compute, and what XLA makes of them on this machine."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from novajax.core.errors import ConfigError
from novajax.quant.aqt import quantize
from novajax.quant.formats import parse
from novajax.quant.matmul import einsum, pick, rows
from novajax.quant.qtensor import QTensor, abstract, dequantized

EQUATIONS = {
    "q": ("td,dnh->tnh", (96, 4, 8), (0,)),
    "o": ("tnh,nhd->td", (6, 32, 40), (0, 1)),
    "down": ("tf,fd->td", (172, 24), (0,)),
    "tied": ("xd,vd->xv", (50, 96), (1,)),
    "expert": ("td,edf->etf", (3, 64, 40), (1,)),
    "experts out": ("etf,efd->td", (3, 64, 40), (1,)),
}


def quantized(shape, contracted, name, seed=0):
    form = parse(name)
    block = abstract(shape, contracted, form).block
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return QTensor(*quantize(jnp.asarray(w), block, form.kind), block, form)


def activations(equation, shape, rows_T, seed=1):
    left, right = equation.split("->")[0].split(",")
    sizes = dict(zip(right, shape, strict=True))
    x = np.random.default_rng(seed).normal(size=[sizes.get(letter, rows_T) for letter in left])
    return x.astype(np.float32)


def case(what, name, rows_T):
    """(equation, weight, activations)."""
    equation, shape, contracted = EQUATIONS[what]
    return equation, quantized(shape, contracted, name), activations(equation, shape, rows_T)


@pytest.mark.parametrize("name", ["int8-w", "fp8", "int4-32-w", "int4-128-w", "int4-channel-w"])
@pytest.mark.parametrize("what", EQUATIONS)
@pytest.mark.parametrize("rows_T", [1, 5, 200])
def test_weight_only_is_the_product_with_the_dequantized_weight(what, name, rows_T):
    equation, weight, x = case(what, name, rows_T)
    wanted = np.einsum(equation, x.astype(np.float64), np.asarray(dequantized(weight), np.float64))
    got = jax.jit(lambda x, w: einsum(equation, x, nnx.Param(w)))(x, weight)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["int8-a8", "int4-32-a8", "int4-channel-a8"])
@pytest.mark.parametrize("what", EQUATIONS)
@pytest.mark.parametrize("rows_T", [1, 5, 200])
def test_int8_activations_are_rounded_by_token(what, name, rows_T):
    equation, weight, x = case(what, name, rows_T)
    letters = equation.split(",")[0]
    row = (set(letters) & {"t", "x"}).pop()
    block = tuple(1 if letter == row else size for letter, size in zip(letters, x.shape, strict=True))
    rounded, scale = quantize(jnp.asarray(x), block, "int8")
    near = np.asarray(rounded, np.float64) * np.asarray(scale, np.float64)
    wanted = np.einsum(equation, near, np.asarray(dequantized(weight), np.float64))
    got = jax.jit(lambda x, w: einsum(equation, x, w))(x, weight)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-5, atol=1e-4)


def test_rows_of_an_embedding_and_one_expert():
    table = quantized((50, 96), (1,), "int8")
    index = jnp.asarray([3, 3, 49])
    got = rows(table, index, jnp.dtype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got), np.asarray(dequantized(table)[index].astype(jnp.bfloat16)))
    table = quantized((50, 96), (1,), "int4-64")
    np.testing.assert_array_equal(np.asarray(rows(table, index, jnp.dtype(jnp.float32))), np.asarray(dequantized(table)[index]))
    experts = quantized((3, 64, 40), (1,), "int4-32")
    one = jax.jit(pick)(experts, jnp.int32(2))
    assert isinstance(one, QTensor)
    np.testing.assert_array_equal(np.asarray(dequantized(one)), np.asarray(dequantized(experts)[2]))


def test_a_part_of_a_group_is_refused():
    whole = quantized((96, 40), (0,), "int4-64-w")
    part = QTensor(whole.values[:32], whole.scale, whole.block, whole.format)
    with pytest.raises(ConfigError, match="parts of groups"):
        einsum("td,df->tf", jnp.ones((2, 32)), part)


def program(name, shape, rows_T):
    weight = quantized(shape, (0,), name)
    x = jnp.ones((rows_T, shape[0]))
    return jax.jit(lambda x, w: einsum("td,df->tf", x, w)).lower(x, weight).compile()


def text_of(name, shape, rows_T):
    return program(name, shape, rows_T).as_text() or ""


@pytest.mark.parametrize("rows_T", [1, 16])
def test_the_cpu_multiplies_int8_by_int8(rows_T):
    """A real s8 x s8 -> s32 dot, no float array of the weight's size, and temporaries far below the weight's bytes."""
    made = program("int8-a8", (512, 1024), rows_T)
    text, memory = made.as_text() or "", made.memory_analysis()
    dots = re.findall(r"= s32\[(\d+),1024\]\S* dot\(", text)
    assert dots == [str(max(rows_T, 2))], "one row goes as two"
    assert not re.search(r"(f32|bf16|s32)\[(512,1024|1024,512)\]", text)
    assert memory is not None
    assert memory.temp_size_in_bytes < 512 * 1024 // 4


def test_on_a_cpu_other_formats_make_a_copy_of_the_weight():
    """The listed exceptions (FACTS.md B2): XLA:CPU has no dot that reads these. Should this fail, XLA learnt to."""
    assert re.search(r"f32\[512,1024\]", text_of("int8-w", (512, 1024), 16))
    assert re.search(r"f32\[512,1024\]", text_of("fp8", (512, 1024), 16))
    assert re.search(r"s8\[512,1024\]\S* convert", text_of("int4-channel-a8", (512, 1024), 16))
