"""Memory by arithmetic, the bucket table, and one upload that unpacks to what was packed. No weights, no compiling."""

import jax.numpy as jnp
import numpy as np
import pytest

from novajax.core.config import EngineConfig, parse_bytes
from novajax.core.errors import CapacityError, ConfigError
from novajax.engine import inputs
from novajax.engine.buckets import make_table
from novajax.engine.capacity import plan_capacity
from novajax.kv.pool import page_bytes
from novajax.models.families.registry import read_config
from novajax.scheduler.plan import DecodeRow, Draw, PrefillRow, StepPlan

LLAMA = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
PAGE = page_bytes(30, 3, 16, 64, jnp.dtype(jnp.float32))


def capacity(limit_bytes: int, **fields):
    config = EngineConfig(model="m", **fields)
    table = make_table(config, 2048, on_cpu=True)
    return plan_capacity(config, read_config(LLAMA), table, limit_bytes=limit_bytes, weights_bytes=538 << 20, page_bytes=PAGE, itemsize=4)


def test_a_page_counts_keys_and_values_of_all_layers():
    assert PAGE == 2 * 30 * 3 * 16 * 64 * 4


def test_plenty_gives_every_row_its_full_context_and_no_more():
    plan = capacity(64 << 30)
    assert plan.pages == 16 * 2048 // 16
    assert plan.used_bytes <= plan.limit_bytes
    assert plan.max_request_tokens == 2048


def test_the_pool_gets_what_is_left():
    plan = capacity(2 << 30)
    assert 128 <= plan.pages < 2048
    assert plan.limit_bytes - PAGE < plan.used_bytes <= plan.limit_bytes
    assert f"{plan.pages:,} pages" in plan.summary()


def test_a_small_pool_lowers_the_longest_request():
    assert capacity(4 << 30, kv_bytes=10 * PAGE).max_request_tokens == 160


@pytest.mark.parametrize(
    ("limit", "fields", "named"), [(600 << 20, {}, "max_context_tokens"), (4 << 30, {"kv_bytes": 8 << 30}, "kv_bytes")]
)
def test_what_does_not_fit_is_refused_with_the_numbers(limit: int, fields: dict, named: str):
    with pytest.raises(CapacityError, match=r"MiB|GiB") as refused:
        capacity(limit, **fields)
    assert refused.value.param == named


def test_sizes_are_read_as_written():
    assert [parse_bytes(text) for text in ("4096", "512Mi", "1.5 GiB", "2GB", "1Ti")] == [4096, 512 << 20, 3 << 29, 2 * 10**9, 1 << 40]
    for text in ("", "Mi", "12Q", "-", "1e400"):
        with pytest.raises(ConfigError):
            parse_bytes(text)


@pytest.mark.parametrize("fields", [{}, {"max_rows": 1}, {"max_rows": 64}, {"deterministic": True}, {"chunk_tokens": 16}])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_plan_of_the_shapes_has_a_bucket(fields: dict, on_cpu: bool):
    config = EngineConfig(model="m", **fields)
    table = make_table(config, 1000, on_cpu=on_cpu)
    buckets = set(table.buckets())
    assert len(buckets) <= 24
    for rows in range(config.max_rows + 1):
        for prefill, score in [(shape, False) for shape in (None, *table.prefill)] + [(table.score, True)]:
            for pages in (1, 20, 63):
                bucket = table.choose(rows, prefill, pages, score)
                assert bucket in buckets
                assert bucket.decode_rows >= rows
                assert bucket.table_pages >= pages
                assert table.sample_rows(bucket) >= bucket.rows
    with pytest.raises(ConfigError):
        table.choose(config.max_rows + 2, None, 1, False)


def test_an_upload_unpacks_to_what_was_packed():
    config = EngineConfig(model="m", max_rows=4, chunk_tokens=32)
    table = make_table(config, 128, on_cpu=True)
    draw = Draw(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=(123 << 32) + 0xFFFFFFF0, repetition_penalty=1.1)
    decode = (DecodeRow(2, 40, (7, 8, 9), draw, True, -1), DecodeRow(0, 3, (1,), Draw(), False, 99))
    prefill = (PrefillRow(1, 16, (5, 6, 7), (3, 4), True, False, -1, draw, False),)
    plan = StepPlan(4, decode, prefill, (), 4, table.prefill[0])
    bucket = table.choose(2, table.prefill[0], 3, False)
    x = {name: np.asarray(array) for name, array in inputs.unpack(jnp.asarray(inputs.pack(plan, bucket, 1, 4)[0]), bucket).items()}
    assert x["decode_slot"][:3].tolist() == [2, 0, 4][: len(x["decode_slot"])]
    assert x["decode_token"][:2].tolist() == [[-1], [99]]
    assert x["decode_position"][:2].tolist() == [[40], [3]]
    assert x["decode_table"][0, :3].tolist() == [7, 8, 9]
    assert (x["prefill_start"][0], x["prefill_length"][0]) == (16, 3)
    assert x["prefill_tokens"][0, :3].tolist() == [5, 6, 7]
    d = {name: np.asarray(array) for name, array in inputs.unpack_draws(jnp.asarray(x["draws"])).items()}
    assert d["position"][:2].tolist() == [41, 4]
    assert d["temperature"][0] == np.float32(0.7)
    assert (np.uint32(d["seed_high"][0]), d["seed_low"].view(np.uint32)[0]) == (123, 0xFFFFFFF0)
    sampled = bucket.decode_rows
    assert (d["slot"][sampled], d["position"][sampled], d["ban_ends"][0]) == (1, 19, 1)
    padded = inputs.unpack(jnp.asarray(inputs.pack(None, bucket, 1, 4)[0]), bucket)
    assert set(np.asarray(padded["decode_position"]).ravel().tolist()) == {inputs.PADDING}
    assert set(np.asarray(padded["draws"])[:, 0].tolist()) == {4}
