"""A rounded KV cache: what pages hold, what attention over them is, what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from novajax.core.errors import ConfigError
from novajax.kernels.attention import paged_attention, write_pages
from novajax.kernels.nibbles import packed, unpacked
from novajax.kv.pool import CacheFormat, Kind, KVPool, Paged, abstract_pool, page_bytes
from novajax.planner.formats import kv_bytes
from novajax.quant.cache import cache_format, rounded

LAYERS, PAGES, KV_HEADS, PAGE, HEAD = 2, 6, 2, 8, 16
TOKENS = 40
STEP: dict[Kind, float] = {"int8": 1 / 254, "int4": 1 / 14, "fp8": 1 / 16}
"""Largest error as a share of the largest number of a vector."""


def filled(x_TKH: jax.Array, kind: Kind | None) -> Paged:
    pool = abstract_pool(LAYERS, PAGES, KV_HEADS, PAGE, HEAD, jnp.dtype(jnp.float32), CacheFormat(kind, kind))
    empty: Paged = jax.tree.map(lambda a: jnp.full(a.shape, 3, a.dtype), pool.keys)
    at = jnp.arange(TOKENS)
    return write_pages(empty, 1, *rounded(x_TKH, kind), PAGES - 1 - at // PAGE, at % PAGE)


def read(held: Paged) -> np.ndarray:
    """float32[TOKENS, K, H], independently of the attention."""
    numbers = np.asarray(held.numbers)[1]
    if held.kind == "int4":
        pairs = numbers.astype(np.int32)
        numbers = np.concatenate([pairs & 15, pairs >> 4], -1)
        numbers = np.where(numbers > 7, numbers - 16, numbers)
    wide = numbers.astype(np.float32) * (1 if held.scale is None else np.asarray(held.scale)[1][..., None])
    return wide[::-1].transpose(0, 2, 1, 3).reshape(-1, KV_HEADS, HEAD)[:TOKENS]


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_what_is_written_is_read_within_a_rounding_step(kind: Kind):
    x = np.random.default_rng(0).normal(size=(TOKENS, KV_HEADS, HEAD)).astype(np.float32) * np.linspace(1e-3, 50, TOKENS)[:, None, None]
    x[3, 1] = 0
    got = read(filled(jnp.asarray(x), kind))
    most = np.abs(x).max(-1, keepdims=True)
    assert (np.abs(got - x) <= most * STEP[kind] * 1.001 + 1e-7).all()
    assert (got[3, 1] == 0).all()


@pytest.mark.parametrize(("keys", "values"), [("int8", "int8"), ("int8", "int4"), ("fp8", "fp8"), (None, "int8"), ("int8", None)])
@pytest.mark.parametrize("window", [None, 9])
def test_attention_over_rounded_pages_is_that_over_the_numbers_they_stand_for(keys: Kind | None, values: Kind | None, window: int | None):
    rng = np.random.default_rng(1)
    k, v = (jnp.asarray(rng.normal(size=(TOKENS, KV_HEADS, HEAD)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(1, 3, 4, HEAD)), jnp.float32)
    tables, positions = jnp.asarray([[PAGES - 1 - i for i in range(5)]]), jnp.asarray([[39, 17, 0]])
    how = {"scale": 0.3, "window": window, "softcap": 20.0}
    small = KVPool(filled(k, keys), filled(v, values))
    wide = KVPool(filled(jnp.asarray(read(small.keys)), None), filled(jnp.asarray(read(small.values)), None))
    got, wanted = (paged_attention(q, pool.keys, pool.values, 1, tables, positions, **how) for pool in (small, wide))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_pairs_in_a_byte():
    x = np.random.default_rng(2).integers(-8, 8, (5, 3, 16)).astype(np.int8)
    assert packed(jnp.asarray(x)).shape == (5, 3, 8)
    assert np.array_equal(unpacked(packed(jnp.asarray(x))), x)


@pytest.mark.parametrize("name", ["int8", "fp8", "int8-int4"])
def test_bytes_are_the_planners(name: str):
    form = cache_format(name, "")
    planned = sum(kv_bytes(kind, KV_HEADS, HEAD) for kind in (form.keys, form.values) if kind is not None)
    assert page_bytes(LAYERS, KV_HEADS, PAGE, HEAD, jnp.dtype(jnp.float32), form) == LAYERS * PAGE * planned


def test_names():
    assert cache_format("auto", "memory_critical") == CacheFormat("int8", "int4")
    assert cache_format("auto", "balanced") == CacheFormat(None, "int8")
    assert cache_format("auto", "int8") == cache_format("auto", "") == cache_format("model", "memory_critical") == CacheFormat()
    with pytest.raises(ConfigError, match="KV cache format 'int3' is not known"):
        cache_format("int3", "")
