"""Formats, blocks and scales: what is stored, that it is what AQT itself makes, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aqt.jax.v2 import aqt_quantizer

from novajax.core.errors import ConfigError
from novajax.planner.formats import array_bytes, blocks, scale_shape
from novajax.planner.sizes import Array
from novajax.quant.aqt import quantize
from novajax.quant.formats import Format, parse, settled
from novajax.quant.qtensor import QTensor, abstract, dequantized, stored_bytes

NAMES = ("int8", "int8-a8", "int8-w", "fp8", "int4-128", "int4-32-a8", "int4-64-w", "int4-channel")


def test_names():
    for name in NAMES:
        assert parse(name).name == name
    assert parse("int4") == Format("int4", 128)
    assert settled(Format("int8"), on_cpu=True).name == "int8-a8"
    assert settled(Format("int8"), on_cpu=False).name == "int8-w"
    assert settled(Format("int8", None, "float"), on_cpu=True).name == "int8-w"


@pytest.mark.parametrize("name", ["int3", "int4-16", "int8-32", "fp8-a8", "int4-", "INT8", "", "float", "int8-a8-w"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ConfigError, match="is not known"):
        parse(name)


@pytest.mark.parametrize(
    ("shape", "contracted", "group", "block"),
    [
        ((96, 4, 8), (0,), None, (96, 1, 1)),
        ((96, 4, 8), (0,), 32, (32, 1, 1)),
        ((8, 32, 96), (0, 1), None, (8, 32, 1)),
        ((8, 32, 96), (0, 1), 128, (4, 32, 1)),
        ((8, 128, 96), (0, 1), 32, (1, 32, 1)),
        ((3, 172, 64), (1,), 32, (1, 32, 1)),
        ((512, 64), (1,), 128, (1, 64)),
    ],
)
def test_blocks(shape, contracted, group, block):
    assert blocks(shape, contracted, group) == block


def weight(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4), ("fp8", "e4m3")])
def test_an_output_channel_is_aqts(kind, bits):
    w = weight((96, 4, 8))
    wanted, _ = aqt_quantizer.quantizer_make(bits).quant(jnp.asarray(w), calibration_axes=[0])
    values, scale = quantize(jnp.asarray(w), (96, 1, 1), kind)
    np.testing.assert_array_equal(np.asarray(values, np.float32), np.asarray(wanted.qvalue, np.float32))
    np.testing.assert_array_equal(np.asarray(scale), np.asarray((wanted.scale or [])[0]))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_are_aqts_and_a_short_one_is_its_own(group):
    w = weight((172, 24))
    values, scale = quantize(jnp.asarray(w), (group, 1), "int4")
    assert values.dtype == jnp.int4
    for number, start in enumerate(range(0, 172, group)):
        wanted, _ = aqt_quantizer.quantizer_make(4).quant(jnp.asarray(w[start : start + group]), calibration_axes=[0])
        np.testing.assert_array_equal(np.asarray(values[start : start + group], np.int8), np.asarray(wanted.qvalue, np.int8))
        np.testing.assert_array_equal(np.asarray(scale[number]), np.asarray((wanted.scale or [])[0][0]))


@pytest.mark.parametrize(("name", "worst"), [("int8", 0.5 / 127.5), ("int4-32", 0.5 / 7.5), ("int4-channel", 0.5 / 7.5), ("fp8", 1 / 28)])
def test_error_is_half_a_bucket(name, worst):
    """fp8 has steps of 1/16 of the value below 1/8 of which it rounds: relative to the largest, 1/28 at most (32 of 448, half)."""
    form = parse(name)
    w = weight((70, 6, 32))
    made = abstract(w.shape, (0,), form)
    tensor = QTensor(*quantize(jnp.asarray(w), made.block, form.kind), made.block, form)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), tensor) == jax.tree.map(lambda a: (a.shape, a.dtype), made)
    largest = np.abs(w).max(axis=0)
    assert np.all(np.abs(np.asarray(dequantized(tensor)) - w) <= largest * worst * 1.0001)


def test_zeros_stay_zeros_and_what_is_not_finite_shows_in_the_scale():
    values, scale = quantize(jnp.zeros((8, 2)), (8, 1), "int8")
    assert not np.asarray(values).any()
    assert np.all(np.asarray(scale) > 0)
    for bad in (np.nan, np.inf):
        w = weight((8, 2))
        w[3, 1] = bad
        scale = np.asarray(quantize(jnp.asarray(w), (8, 1), "int8")[1])
        assert np.isfinite(scale).tolist() == [[True, False]]


@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
def test_bytes_are_the_planners(form):
    shape, contracted = (8, 32, 96), (0, 1)
    made = abstract(shape, contracted, parse(form))
    array = Array("o", "attention_out", shape, ("heads", "head_dim", "embed"), contracted)
    ours = sum(stored_bytes(part.shape, part.dtype) for part in (made.values, made.scale))
    assert ours == array_bytes(array, shape, form)
    assert made.scale.shape == scale_shape(shape, made.block)
