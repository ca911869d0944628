"""A CPU's native kernels against the plain definitions. Skipped, saying so, where no compiler is."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from novajax.kernels import attention as plain
from novajax.kernels.native import attention as native
from novajax.kernels.native import library
from novajax.kv.pool import CacheFormat, KVPool, Paged, abstract_pool
from novajax.planner.formats import blocks
from novajax.quant import matmul
from novajax.quant.aqt import quantize
from novajax.quant.cache import rounded
from novajax.quant.formats import parse
from novajax.quant.packed import Packed, halved, packed
from novajax.quant.qtensor import QTensor, dequantized

SUMMED = (0,)


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("native", numbered=True)
    folder.chmod(0o700)
    if not library.register(folder):
        pytest.skip("no C++ compiler: the native kernels are not built")


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def quantized(name: str, weight: jax.Array, summed: tuple[int, ...] = SUMMED) -> QTensor:
    form = parse(name)
    block = blocks(weight.shape, summed, form.group)
    return QTensor(*quantize(weight, block, form.kind), block, form)


@pytest.mark.parametrize("name", ["int8-a8", "int8-w", "int4-32-a8", "int4-64-w", "int4-channel-a8", "int4-channel-w"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 96, 64), (7, 172, 100), (130, 256, 65)])
def test_quantized_products_equal_the_plain_ones(name: str, rows: int, inputs: int, outputs: int):
    weight = quantized(name, normal(0, inputs, outputs))
    x = normal(1, rows, inputs) * jnp.linspace(0.1, 5, rows)[:, None]
    held = packed(weight, SUMMED)
    assert isinstance(held, Packed)
    np.testing.assert_allclose(
        matmul.einsum("td,df->tf", x, held), matmul.einsum("td,df->tf", x, weight), rtol=1e-5, atol=2e-5 * inputs**0.5
    )


def test_float_products_are_sums_of_exact_products():
    weight, x = normal(0, 190, 100), normal(1, 13, 190)
    half = halved(weight.astype(jnp.bfloat16).astype(jnp.float32))
    assert half.dtype == jnp.bfloat16
    assert halved(weight) is weight
    for held in (weight, half):
        wide = np.asarray(x, np.float64) @ np.asarray(held, np.float64)
        np.testing.assert_allclose(matmul.einsum("td,df->tf", x, packed(held, SUMMED)), wide, atol=3e-5)
    short = x.astype(jnp.bfloat16)
    wide = np.asarray(short, np.float64) @ np.asarray(half, np.float64)
    found = matmul.einsum("td,df->tf", short, packed(half, SUMMED), dtype=jnp.float32)
    np.testing.assert_allclose(found, wide, atol=3e-5)


@pytest.mark.parametrize("name", ["", "int8-a8", "int4-32-a8"])
def test_a_row_has_the_same_bits_alone_and_in_a_crowd(name: str):
    weight, x = normal(0, 512, 192), normal(1, 100, 512)
    held = packed(quantized(name, weight) if name else weight, SUMMED)
    crowd = np.asarray(matmul.einsum("td,df->tf", x, held))
    for row in (0, 50, 99):
        np.testing.assert_array_equal(np.asarray(matmul.einsum("td,df->tf", x[row : row + 1], held))[0], crowd[row])


def test_several_weights_of_one_input_and_several_summed_dimensions():
    x = normal(0, 5, 64)
    q, k = normal(1, 64, 4, 32), normal(2, 64, 2, 32)
    found = matmul.einsums(("td,dnh->tnh", "td,dkh->tkh"), x, (packed(q, (0,)), packed(k, (0,))))
    for out, weight in zip(found, (q, k), strict=True):
        np.testing.assert_allclose(out, jnp.einsum("td,dnh->tnh", x, weight, precision="highest"), atol=2e-5)
    mixed = matmul.einsums(("td,dnh->tnh", "td,dkh->tkh"), x, (packed(quantized("int8-a8", q), (0,)), packed(k, (0,))))
    np.testing.assert_allclose(mixed[1], found[1], atol=1e-6)
    out = normal(3, 4, 32, 64)
    for name in ("", "int4-64-a8"):
        weight = quantized(name, out, (0, 1)) if name else out
        np.testing.assert_allclose(
            matmul.einsum("tnh,nhd->td", found[0], packed(weight, (0, 1))),
            matmul.einsum("tnh,nhd->td", found[0], weight),
            rtol=1e-4,
            atol=1e-3,
        )


@pytest.mark.parametrize("name", ["", "int8-a8", "int4-32-a8"])
def test_rows_of_a_packed_embedding(name: str):
    weight = normal(0, 70, 96)
    held = quantized(name, weight, (1,)) if name else weight
    index = jnp.array([[0, 69], [64, 5]])
    expected = (dequantized(held) if isinstance(held, QTensor) else held)[index]
    np.testing.assert_array_equal(matmul.rows(packed(held, (1,)), index, jnp.float32), expected)


def test_what_has_no_native_form_stays():
    fp8, uneven = quantized("fp8", normal(0, 64, 64)), quantized("int4-32", normal(0, 4, 48, 64), (0, 1))
    assert packed(fp8, SUMMED) is fp8
    assert packed(uneven, (0, 1)) is uneven


@pytest.mark.parametrize("name", ["", "int8-a8", "int4-32-a8"])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_row_does(name: str):
    weight = normal(0, 64, 64)
    held = packed(quantized(name, weight) if name else weight, SUMMED)
    found = np.asarray(matmul.einsum("td,df->tf", normal(1, 4, 64).at[2, 5].set(jnp.nan), held))
    assert np.isnan(found[2]).all()
    assert np.isfinite(found[[0, 1, 3]]).all()


FORMS = [CacheFormat(), CacheFormat("int8", "int8"), CacheFormat("int8", "int4"), CacheFormat("fp8", "fp8")]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.keys}-{form.values}")
@pytest.mark.parametrize(("queries", "how"), [(1, {}), (20, {}), (1, {"window": 21}), (20, {"window": 21, "softcap": 3.0})])
def test_attention_equals_the_plain_one(form: CacheFormat, queries: int, how: dict[str, Any]):
    heads, kv_heads, head_dim, page, width = 6, 2, 24, 16, 8
    pool = filled_pool(form, kv_heads, head_dim, page, pages=40)
    q = normal(3, 3, queries, heads, head_dim)
    tables = jax.random.permutation(jax.random.key(4), 40)[: 3 * width].reshape(3, width)
    last = jnp.array([127, 70, queries - 1])[:, None]
    positions = last - jnp.arange(queries)[::-1][None]
    arguments = (q, pool.keys, pool.values, 1, tables, positions)
    out, lse = jax.jit(lambda *a: native.paged_attention(a[0], a[1], a[2], 1, a[3], a[4], scale=0.2, **how))(
        q, pool.keys, pool.values, tables, positions
    )
    wide, wide_lse = plain.paged_attention(*arguments, scale=0.2, **how)
    np.testing.assert_allclose(out, wide, atol=2e-5)
    np.testing.assert_allclose(lse, wide_lse, atol=2e-5)


def test_padding_queries_and_bfloat16():
    pool = filled_pool(CacheFormat(), 2, 32, 16, pages=8, dtype=jnp.bfloat16)
    q = normal(3, 2, 3, 4, 32).astype(jnp.bfloat16)
    positions = jnp.array([[40, 41, -1], [-1, -1, -1]])
    tables = jnp.arange(8).reshape(2, 4)
    out, lse = native.paged_attention(q, pool.keys, pool.values, 0, tables, positions, scale=0.2)
    wide, _ = plain.paged_attention(q, pool.keys, pool.values, 0, tables, positions, scale=0.2)
    np.testing.assert_allclose(out[0, :2], wide[0, :2], atol=0.03)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("form", FORMS[:3], ids=lambda form: f"{form.keys}-{form.values}")
def test_written_pages_equal_the_plain_ones(form: CacheFormat):
    held = filled_pool(form, 2, 24, 16, pages=6)
    k = normal(5, 4, 2, 24)
    pages, offsets = jnp.array([3, 6, 0, 5]), jnp.array([15, 2, 7, 0])  # page 6 is past the end: dropped

    def write(module, held: Paged, kind) -> Paged:
        return module.write_pages(held, 1, *rounded(k, kind), pages, offsets)

    for side, kind in ((held.keys, form.keys), (held.values, form.values)):
        found = jax.jit(lambda paged, kind=kind: write(native, paged, kind), donate_argnums=0)(jax.tree.map(jnp.copy, side))
        jax.tree.map(np.testing.assert_array_equal, found, write(plain, side, kind))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_are_rounded_as_the_plain_ones(dtype):
    x = (normal(0, 9, 3, 40) * jnp.linspace(0, 4, 9)[:, None, None]).astype(dtype)  # the first rows are zeros
    numbers, scale = native.round_rows(x)
    wanted, wanted_scale = rounded(x, "int8")
    np.testing.assert_array_equal(numbers, wanted)
    np.testing.assert_allclose(scale, np.asarray(wanted_scale), rtol=1e-6)


def filled_pool(form: CacheFormat, kv_heads: int, head_dim: int, page: int, pages: int, dtype=jnp.float32) -> KVPool:
    pool = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_pool(2, pages, kv_heads, page, head_dim, dtype, form))
    ids, offsets = (a.reshape(-1) for a in jnp.meshgrid(jnp.arange(pages), jnp.arange(page), indexing="ij"))
    for layer in range(2):
        k, v = normal(10 + layer, pages * page, kv_heads, head_dim), normal(20 + layer, pages * page, kv_heads, head_dim)
        keys = plain.write_pages(pool.keys, layer, *rounded(k.astype(dtype), form.keys), ids, offsets)
        values = plain.write_pages(pool.values, layer, *rounded(v.astype(dtype), form.values), ids, offsets)
        pool = KVPool(keys, values)
    return pool


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path):
    tmp_path.chmod(0o777)
    assert not library.register(tmp_path)
    assert not list(tmp_path.iterdir())
