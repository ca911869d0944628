"""Bytes: the published models' exact counts, and small cases counted by hand."""

import json
import math

import msgspec
import pytest
from planner_world import ROOT, architecture, tiny, tiny_config, toy_cluster

from novajax.core.config import EngineConfig, MeshConfig, parse_mesh
from novajax.core.errors import CapacityError, ConfigError
from novajax.engine.buckets import make_table
from novajax.engine.capacity import step_reserve_bytes
from novajax.models.decoder import parameter_count
from novajax.models.families.registry import read_config
from novajax.models.sizes import model_sizes
from novajax.parallel.axes import slots_per_stage
from novajax.planner.formats import SCALE_BYTES, array_bytes, profile, profiles
from novajax.planner.hardware import cluster
from novajax.planner.layout import Layout, span, stage_kinds
from novajax.planner.memory import Demand, activation_bytes, kv_token_bytes, layer_weights_bytes, model_bytes, plan_memory, weights_bytes

LAYER, NORMS, ENDS = 592, 16, 32 * 8 * 2 + 8
BF16 = profile("bf16")


@pytest.mark.parametrize(
    ("name", "parameters", "bf16_bytes", "kv_bytes"),
    [
        ("8b", 8_030_261_248, 16_060_522_496, 131_072),
        ("70b", 70_553_706_496, 141_107_412_992, 327_680),
        ("405b", 405_853_388_800, 811_706_777_600, 516_096),
    ],
)
def test_the_published_models_are_counted_exactly(name, parameters, bf16_bytes, kv_bytes):
    cfg = architecture(name)
    sizes = model_sizes(cfg)
    assert sizes.parameters == parameters
    assert model_bytes(sizes, BF16) == bf16_bytes
    assert kv_token_bytes(sizes, BF16) == kv_bytes


def test_the_count_is_that_of_the_abstract_module():
    assert model_sizes(architecture("8b")).parameters == parameter_count(architecture("8b"))
    assert tiny().parameters == parameter_count(tiny_config()) == 4 * LAYER + ENDS


@pytest.mark.parametrize("family", sorted(path.name for path in (ROOT / "tests/data/nano").iterdir()))
def test_every_family_is_counted_exactly(family):
    cfg = read_config(json.loads((ROOT / "tests/data/nano" / family / "config.json").read_text()))
    assert model_sizes(cfg).parameters == parameter_count(cfg)


@pytest.mark.parametrize(("tensor", "query", "context"), [(1, 1, 1), (2, 2, 1), (8, 1, 2)])
def test_activations_are_the_engines_own_reserve(tensor, query, context):
    cfg = architecture("8b")
    mesh = MeshConfig(tensor_parallel=tensor * query, context=context)
    config = EngineConfig(model="m", mesh=mesh, max_rows=16, max_context_tokens=4096, chunk_tokens=512)
    engine = step_reserve_bytes(cfg, make_table(config, 4096, on_cpu=False), config.page_tokens, 2, mesh.tensor_parallel)
    demand = Demand(context_tokens=4096, chunk_tokens=512, page_tokens=config.page_tokens)
    assert activation_bytes(model_sizes(cfg), BF16, Layout(tensor=tensor, query=query, context=context), demand, 16) == engine


def test_weights_are_cut_over_tensor_query_and_stage():
    whole = sum(weights_bytes(tiny(), BF16, Layout()).values())
    assert whole == 2 * (4 * LAYER + ENDS)
    cut = layer_weights_bytes(tiny(), BF16, Layout(stage=2, tensor=2, query=2))
    # 2 layers: q and o by 4, k and v by 2 (replicated over query), the MLP by 4, norms whole
    assert sum(cut.values()) == 2 * 2 * (128 // 4 + 64 // 2 + 384 // 4 + NORMS)
    ends = weights_bytes(tiny(), BF16, Layout(stage=2, tensor=2, query=2))
    assert ends["embedding"] == ends["head"] == 2 * 32 * 8 // 8  # vocabulary over all eight


def test_data_and_context_do_not_cut_weights():
    assert weights_bytes(tiny(), BF16, Layout(data=4, context=2)) == weights_bytes(tiny(), BF16, Layout())


def test_scales_are_counted():
    gate = next(array for array in tiny().kinds[0].arrays if array.name.endswith("mlp/gate"))
    assert array_bytes(gate, (8, 16), "int8") == 128 + 16 * SCALE_BYTES  # one for each output
    assert array_bytes(gate, (256, 16), "int4") == 2048 + 2 * 16 * SCALE_BYTES  # and for each 128 inputs
    assert array_bytes(gate, (8, 16), "bfloat16") == 256


def test_depth_is_padded_to_whole_patterns():
    deep = model_sizes(architecture("405b"))
    assert [slots_per_stage(deep.layers, stages) for stages in (1, 4, 8, 16)] == [126, 32, 16, 8]
    five = msgspec.structs.replace(tiny(5), kinds=tiny().kinds * 3, layers=(0, 0, 1, 0, 0, 1, 0, 0))
    assert five.period == 3
    assert slots_per_stage(five.layers, 2) == 6
    assert stage_kinds(five, 2) == [4, 2, 0]


def test_memory_of_a_small_layout_by_hand():
    demand = Demand(rows=4, context_tokens=64, prompt_tokens=24, output_tokens=8, chunk_tokens=16, page_tokens=8)
    layout = Layout(stage=2, context=2, tensor=2)
    memory = plan_memory(tiny(3), BF16, layout, toy_cluster(4), demand)
    assert memory.page_tokens == 16
    assert memory.page_bytes == 2 * (2 * 1 * 2) * 2 * 8  # 2 slots of keys and values, 1 of 2 heads, bfloat16, 8 tokens
    assert memory.masked_layers == 1
    assert memory.padding_bytes == sum(layer_weights_bytes(tiny(3), BF16, layout).values()) // 2
    assert memory.sampling_bytes == 4 * 32 * 9
    assert memory.pages == 4 * 64 // 16  # every row's longest context
    assert memory.kv_tokens == 4 * 64
    parts = memory.all_weights_bytes + memory.kv_pool_bytes + memory.sampling_bytes + memory.activation_bytes
    assert parts + memory.runtime_bytes + memory.free_bytes == memory.hbm_bytes == 1_000_000


def test_rows_are_what_the_memory_holds():
    demand = Demand(context_tokens=64, prompt_tokens=24, output_tokens=8, chunk_tokens=16, page_tokens=8)
    memory = plan_memory(tiny(), BF16, Layout(data=2), toy_cluster(hbm_bytes=200_000), demand)
    assert 0 < memory.rows < 1024
    assert memory.rows * 32 <= memory.kv_tokens
    assert memory.free_bytes >= 0


def test_what_does_not_fit_is_refused_with_numbers():
    sizes = model_sizes(architecture("405b"))
    with pytest.raises(CapacityError, match=r"weights 94\.50 GiB .* of 79\.11 GiB exceed it by"):
        plan_memory(sizes, BF16, Layout(tensor=8), cluster("h100", 1), Demand())


@pytest.mark.parametrize(
    ("layout", "message"),
    [(Layout(tensor=2, query=3), "heads=4 does not divide by 6"), (Layout(stage=3), "vocab=32 does not divide by 3")],
)
def test_what_does_not_divide_is_refused_with_numbers(layout, message):
    with pytest.raises(ConfigError, match=message):
        weights_bytes(tiny(), BF16, layout)


def test_layouts_are_read_strictly():
    assert parse_mesh("tensor=8, stage=2", "layout").devices == 16
    for text in ("tensor", "tensor=0", "rows=2", "tensor=2,tensor=4", "stage=-1"):
        with pytest.raises(ConfigError, match="layout"):
            parse_mesh(text, "layout")


def test_groups_know_which_hosts_they_lie_on():
    layout = Layout(stage=8, context=2, tensor=8)
    tensor = span(layout, ("tensor", "query"), 2)
    assert (tensor.members, tensor.hosts, tensor.per_host) == (8, 4, 2)
    assert span(Layout(stage=2, tensor=8), ("tensor", "query"), 8).hosts == 1
    assert span(Layout(stage=2, tensor=8), ("stage",), 8).hosts == 2
    assert span(Layout(tensor=4, replicas=2), ("tensor", "query"), 6).hosts == 2  # the second group straddles


def test_profiles_cover_the_contract():
    named = profiles()
    assert named["memory_critical"].keys == "int8"
    assert named["memory_critical"].values == "int4"
    assert named["balanced"].attention_out == "bfloat16"
    assert named["quality_critical"].head == "float32"
    sizes = tiny()
    assert math.isclose(kv_token_bytes(sizes, named["memory_critical"]), 4 * (2 * 2 + 2 * 4 + 2 * 1 + 2 * 4))
