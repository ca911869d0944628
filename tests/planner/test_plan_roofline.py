"""Time bounds: small cases by hand, what each axis does to them, and published results below every bound."""

import pytest
from planner_world import architecture, tiny, toy_cluster

from novajax.models.sizes import model_sizes
from novajax.planner.formats import profile
from novajax.planner.hardware import HOP_S, cluster
from novajax.planner.layout import Layout
from novajax.planner.links import Tokens, collectives
from novajax.planner.memory import layer_weights_bytes, weights_bytes
from novajax.planner.published import compare, published
from novajax.planner.roofline import Work, bounds, step

BF16 = profile("bf16")


def test_one_decode_step_by_hand():
    found = step(tiny(), BF16, Layout(), toy_cluster(), Work(decode_rows=3, decode_context_tokens=10, drawing_rows=3))
    matrices = 4 * (64 + 32 + 32 + 64 + 384) + 32 * 8
    assert found.matmul_flop == 2 * 3 * matrices
    assert found.attention_flop == 4 * 4 * 3 * 10 * 4 * 2  # layers, q.k and p.v, rows, tokens, heads, head_dim
    kv_token = 4 * 2 * 2 * 2 * 2  # layers, keys and values, heads, head_dim, bytes
    assert found.kv_read_bytes == 3 * 10 * kv_token + 3 * kv_token  # what is there, and the new tokens
    assert found.weights_read_bytes == sum(weights_bytes(tiny(), BF16, Layout()).values()) - 32 * 8 * 2  # the embedding is not read through
    assert found.math_s == pytest.approx((found.matmul_flop + found.attention_flop) * 1e-9)
    assert found.hbm_s == pytest.approx((found.weights_read_bytes + found.kv_read_bytes) * 1e-9)
    assert found.links_s == 0
    assert found.seconds == max(found.math_s, found.hbm_s)
    assert found.binds == "math"


def test_collectives_of_tensor_parallelism_by_hand():
    said = collectives(tiny(), Layout(tensor=2), toy_cluster(), 4, Tokens(3, 0, 3), 2)
    counted = {one.what: (one.kind, one.count, one.bytes) for one in said}
    assert counted == {
        "embedding": ("all-reduce", 1, 3 * 8 * 2),
        "attention output": ("all-reduce", 4, 3 * 8 * 4),  # float32
        "mlp output": ("all-reduce", 4, 3 * 8 * 4),
        "logits": ("all-gather", 1, 3 * 32 * 4),
    }
    attention = next(one for one in said if one.what == "attention output")
    assert attention.seconds == pytest.approx(4 * (HOP_S["nvlink"] + 96 / 1e8))
    logits = next(one for one in said if one.what == "logits")
    assert logits.seconds == pytest.approx(HOP_S["nvlink"] + 384 / 2 / 1e8)


def test_stages_and_context_have_their_own_collectives():
    said = {one.what for one in collectives(tiny(), Layout(stage=2, context=2), toy_cluster(2), 2, Tokens(3, 4, 3), 2)}
    assert said == {
        "embedding, over stages",
        "rows that draw, from the last stage",
        "logits, over stages",
        "hidden states to the next stage",
        "keys, then values, round the ring",
        "queries round the ring",
        "their results so far",
        "their log-sum-exp",
        "results home",
        "the chunk's last token",
        "largest log-sum-exp, and the sum",
        "partial attention",
    }


def test_the_network_is_slower_and_shared_by_the_host():
    near = collectives(tiny(), Layout(tensor=2), toy_cluster(1, 2), 4, Tokens(3, 0, 3), 2)[1]
    far = collectives(tiny(), Layout(tensor=2), toy_cluster(2, 1), 4, Tokens(3, 0, 3), 2)[1]
    assert far.seconds == pytest.approx(4 * (HOP_S["network"] + 96 / 1e7))
    assert far.seconds > near.seconds
    assert far.link == "network over 2 hosts"


def test_a_pipeline_reads_its_own_share_in_each_tick():
    sizes, hosts = tiny(), toy_cluster(2, 2)
    how = {"rows": 8, "prompt_tokens": 16, "output_tokens": 16, "chunk_tokens": 8}
    one, four = (bounds(sizes, BF16, Layout(stage=stage), hosts, **how) for stage in (1, 4))
    assert four.decode.weights_read_bytes < one.decode.weights_read_bytes / 3
    assert four.decode.matmul_flop < one.decode.matmul_flop / 12  # a quarter of the layers for a quarter of the rows
    assert four.token_s == 4 * four.decode.seconds
    assert one.ttft_s == 2 * one.prefill.seconds  # two chunks
    assert four.ttft_s == 5 * four.prefill.seconds  # the second follows the first through four stages


def test_masked_layers_cost_time():
    work = Work(decode_rows=2, decode_context_tokens=4, drawing_rows=2)
    three, four = (step(tiny(layers), BF16, Layout(stage=2), toy_cluster(), work) for layers in (3, 4))
    assert three.matmul_flop == four.matmul_flop
    assert layer_weights_bytes(tiny(3), BF16, Layout(stage=2)) == layer_weights_bytes(tiny(4), BF16, Layout(stage=2))


def test_the_textbook_floor_of_405b():
    """One stream of 8-bit weights on eight H100: 15.1 ms: bytes over bandwidth."""
    found = bounds(
        model_sizes(architecture("405b")),
        profile("fp8"),
        Layout(tensor=8),
        cluster("h100", 1),
        rows=1,
        prompt_tokens=1,
        output_tokens=1,
        chunk_tokens=1,
    )
    assert found.alone_token_s == pytest.approx(15.1e-3, rel=0.02)
    assert found.decode.binds == "HBM"


def test_no_published_result_beats_a_bound():
    models = {name: model_sizes(architecture(name)) for name in ("8b", "70b", "405b")}
    found = [compare(result, models[result.model]) for result in published()]
    assert len(found) >= 20
    assert {one.published.source.split()[0] for one in found} >= {"MLPerf", "TensorRT-LLM", "NVIDIA", "arXiv"}
    assert not [one for one in found if not 0 < one.reached < 1]
