"""The GPU attention kernel against the plain definition, interpreted on the CPU, over the shapes of real models."""

import jax.numpy as jnp
import numpy as np
import pytest

from novajax.core.errors import ConfigError
from novajax.kernels.attention import merge, paged_attention
from novajax.kernels.gpu import attention as gpu
from novajax.kv.pool import CacheFormat, Kind, Paged, abstract_pool
from novajax.quant.cache import rounded

LAYERS, LAYER, PAGES = 2, 1, 24
SHAPES = [(64, 2, 1, 16), (128, 1, 4, 64), (128, 1, 8, 16), (80, 2, 4, 8), (256, 1, 2, 16)]
"""Head dim, KV heads, query heads of each, page."""


def pools(rng: np.random.Generator, shape: tuple[int, int, int, int], form: CacheFormat, dtype=jnp.float32) -> tuple[Paged, Paged]:
    head_dim, kv_heads, _, page = shape
    empty = abstract_pool(LAYERS, PAGES, kv_heads, page, head_dim, jnp.dtype(dtype), form)

    def fill(paged: Paged, kind: Kind | None) -> Paged:
        numbers, scale = rounded(jnp.asarray(rng.normal(size=(LAYERS * PAGES * kv_heads * page, 1, head_dim)), dtype), kind)
        return Paged(numbers.reshape(paged.numbers.shape), None if scale is None else scale.reshape(paged.scale.shape))

    return fill(empty.keys, form.keys), fill(empty.values, form.values)


def queries(rng: np.random.Generator, shape: tuple[int, int, int, int], lengths: list[list[int]], width: int, dtype=jnp.float32):
    """(q, tables, positions): every row has pages of its own and, behind what it holds, ids that mean nothing."""
    head_dim, kv_heads, groups, page = shape
    positions = np.asarray(lengths, np.int32)
    tables = np.full((len(lengths), width), PAGES, np.int32)
    free = iter(rng.permutation(PAGES))
    for row, most in enumerate(positions.max(1)):
        for column in range(most // page + 1 if most >= 0 else 0):
            tables[row, column] = next(free)
    q = jnp.asarray(rng.normal(size=(*positions.shape, kv_heads * groups, head_dim)), dtype)
    return q, jnp.asarray(tables), jnp.asarray(positions)


def compare(arguments, positions, atol=3e-6, **how) -> None:
    """Padding queries have no defined result; it has to be finite."""
    got = gpu.paged_attention(*arguments, **how)
    wanted = paged_attention(*arguments, **{name: given for name, given in how.items() if name != "splits"})
    real = np.asarray(positions) >= 0
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        assert one.dtype == jnp.float32
        assert np.isfinite(one).all()
        np.testing.assert_allclose(np.asarray(one)[real], np.asarray(other)[real], atol=atol)


@pytest.mark.parametrize("how", [{}, {"window": 50, "softcap": 5.0, "splits": 3}], ids=["alone", "split"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_rows_of_ragged_lengths(shape, how):
    rng = np.random.default_rng(0)
    q, tables, positions = queries(rng, shape, [[0], [-1], [shape[3] - 1], [shape[3]], [131]], 17)
    keys, values = pools(rng, shape, CacheFormat())
    compare((q, keys, values, LAYER, tables, positions), positions, scale=shape[0] ** -0.5, **how)


@pytest.mark.parametrize(("keys", "values"), [("int8", "int8"), ("int8", "int4"), ("fp8", "fp8"), ("int4", None), (None, "int8")])
def test_rounded_pages(keys, values):
    rng, shape = np.random.default_rng(1), (80, 2, 4, 8)
    q, tables, positions = queries(rng, shape, [[5], [-1], [99]], 16)
    held = pools(rng, shape, CacheFormat(keys, values))
    compare((q, *held, LAYER, tables, positions), positions, scale=0.1, window=70, splits=2)


@pytest.mark.parametrize(("groups", "how"), [(1, {"splits": 1}), (3, {"window": 20}), (8, {"softcap": 5.0})])
def test_chunks_over_a_prefix(groups, how):
    """A chunk that begins in the middle of a page, one that ends in padding, one of nothing but padding."""
    rng = np.random.default_rng(2)
    shape, chunk = (64, 2, groups, 16), 37
    starts, sizes = [21, 0, 40], [chunk, 11, 0]
    lengths = [[start + i if i < size else -1 for i in range(chunk)] for start, size in zip(starts, sizes, strict=True)]
    q, tables, positions = queries(rng, shape, lengths, 12)
    keys, values = pools(rng, shape, CacheFormat("int8", None))
    compare((q, keys, values, LAYER, tables, positions), positions, scale=0.125, **how)


def test_pages_over_context_shards():
    """Each shard is its own plain definition; together they are attention over the whole page."""
    rng = np.random.default_rng(3)
    shape = (64, 2, 4, 8)
    q, tables, positions = queries(rng, (*shape[:3], 16), [[0], [9], [100]], 10)
    shards = [pools(rng, shape, CacheFormat()) for _ in range(2)]
    parts = []
    for shard, (keys, values) in enumerate(shards):
        how = {"scale": 0.125, "window": 30, "shards": 2, "shard": jnp.int32(shard), "splits": 2}
        parts.append(gpu.paged_attention(q, keys, values, LAYER, tables, positions, **how))
    keys, values = (Paged(jnp.concatenate([shards[0][i].numbers, shards[1][i].numbers], axis=3)) for i in range(2))
    wanted = paged_attention(q, keys, values, LAYER, tables, positions, scale=0.125, window=30)
    for one, other in zip(merge(*parts), wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6)


def test_bfloat16():
    rng = np.random.default_rng(4)
    shape = (128, 2, 4, 16)
    q, tables, positions = queries(rng, shape, [[77], [300]], 20, jnp.bfloat16)
    keys, values = pools(rng, shape, CacheFormat("int8", None), jnp.bfloat16)
    compare((q, keys, values, LAYER, tables, positions), positions, atol=0.02, scale=128**-0.5)


def test_one_byte_numbers_that_32_bits_cannot_reach_are_refused():
    paged = abstract_pool(3, 2**14, 8, 64, 128, jnp.dtype(jnp.float32), CacheFormat("int8")).keys  # 3 GiB, in name only
    with pytest.raises(ConfigError, match="fewer or more pages"):
        gpu.paged_attention(
            jnp.zeros((1, 1, 8, 128)), paged, paged, 0, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32), scale=1.0
        )
