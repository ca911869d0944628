"""Quantities, the `llm_engine:` tree, and what each of its keys leads to."""

import re
from typing import Any

import msgspec
import pytest
import yaml
from absl import flags
from planner_world import CONFIGS, ROOT

from novajax import options
from novajax.core.config import EngineConfig, MeshConfig
from novajax.core.errors import ConfigError
from novajax.core.llm_engine import given_paths, read_tree
from novajax.core.plan import PlanConfig
from novajax.core.units import parse_bytes_per_s, parse_cpus, parse_gpus, parse_seconds
from novajax.deployment import architecture_file, engine_fields, nccl_environment, not_honoured, plan_config, read_plan_section

REFERENCE = CONFIGS / "llama-405b-reference.yaml"


def reference() -> dict[str, Any]:
    return yaml.safe_load(REFERENCE.read_text())["llm_engine"]


def test_quantities_are_read():
    gpus = parse_gpus("2xH100")
    assert (gpus.count, gpus.kind) == (2, "h100")
    assert parse_bytes_per_s("200Gbps") == 25e9
    assert parse_seconds("200ms") == pytest.approx(0.2)
    assert (parse_cpus("16"), parse_cpus("500m")) == (16, 0.5)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_gpus, "H100"),
        (parse_gpus, "0xH100"),
        (parse_gpus, "2x"),
        (parse_bytes_per_s, "200"),
        (parse_bytes_per_s, "200GB"),
        (parse_bytes_per_s, "0Gbps"),
        (parse_seconds, "soon"),
        (parse_seconds, "-5ms"),
        (parse_cpus, "many"),
        (parse_cpus, "²"),
    ],
)
def test_what_is_no_quantity_is_refused_with_itself(parse, text):
    with pytest.raises(ConfigError, match=re.escape(repr(text))):
        parse(text)


def test_the_reference_document_loads_and_leads_to_a_plan():
    config = plan_config(read_tree(reference()))
    assert (config.chip, config.nodes, config.gpus_per_node) == ("h100", 64, 2)
    assert config.layout == "tensor=8,stage=8,context=2"
    assert (config.profile, config.kv_format, config.rows, config.ttft) == ("int8", "int8", 256, "200ms")
    assert config.network_bandwidth == "100Gbps"  # the limit is less than the 200 Gb/s there are
    assert architecture_file("llama-405b", CONFIGS).exists()


def test_the_reference_document_settles_the_engine():
    fields = {"model": "m"} | engine_fields(reference())
    config = msgspec.convert(fields, EngineConfig)
    assert config.mesh == MeshConfig(stage=8, context=2, tensor_parallel=8)
    assert (config.max_rows, config.served_name, config.quantization, config.kv_cache_dtype) == (256, "llama-405b", "int8", "int8")


def test_every_key_has_an_effect_or_a_line():
    document = reference()
    lines = not_honoured(document)
    silent = [path for path in given_paths(document) if not any(f": {path}: " in line for line in lines)]
    assert silent == [
        "model.quantization",
        "model.sharding.tensor_parallel",
        "model.sharding.pipeline_parallel",
        "model.sharding.sequence_parallel",
        "performance.max_batch_size",
        "performance.compression",
        "networking.priority_queuing",
    ]
    assert all(line.startswith("not honoured here: ") for line in lines)
    document["networking"]["priority_queuing"] = False
    assert any("networking.priority_queuing" in line for line in not_honoured(document))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.sharding.expert_parallel", 2, r"unknown field `expert_parallel` - at `llm_engine\.model\.sharding`"),
        ("workers.resources.gpus", "2xH100", r"unknown field `gpus` - at `llm_engine\.workers\.resources`"),
        ("surprise", 1, "unknown field `surprise`"),
        ("workers.resources.gpu", "two", r"llm_engine\.workers\.resources\.gpu: 'two'"),
        ("coordinator.resources.memory", "64Gb1", r"llm_engine\.coordinator\.resources\.memory"),
        ("workers.replicas", 0, r"llm_engine\.workers\.replicas"),
        ("networking.transport", "pigeon", r"llm_engine\.networking\.transport"),
        ("performance.target_latency", 200, r"llm_engine\.performance\.target_latency"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_path(path, value, message):
    document = reference()
    place = document
    *parents, last = path.split(".")
    for name in parents:
        place = place[name]
    place[last] = value
    with pytest.raises(ConfigError, match=message):
        read_tree(document)


def test_unknown_models_profiles_and_keys_are_refused():
    with pytest.raises(ConfigError, match="'gpt-9'"):
        architecture_file("gpt-9", CONFIGS)
    with pytest.raises(ConfigError, match="unknown field `speed`"):
        read_plan_section({"speed": 1})
    assert read_plan_section({}) == PlanConfig()


def test_transport_is_nccl_s_environment():
    document = reference()
    assert nccl_environment(read_tree(document))["NCCL_IB_DISABLE"] == "0"
    document["networking"]["transport"] = "tcp"
    assert nccl_environment(read_tree(document)) == {"NCCL_IB_DISABLE": "1"}


def test_a_start_reads_the_tree_and_the_planner_settles_auto(tmp_path, monkeypatch):
    """The engine's options on the reference document with `sharding: auto`."""
    document = yaml.safe_load(REFERENCE.read_text())
    document["llm_engine"]["model"]["sharding"] = "auto"
    path = tmp_path / "tree.yaml"
    path.write_text(yaml.safe_dump(document))
    (tmp_path / "llama-3.1-405b.yaml").write_text((CONFIGS / "llama-3.1-405b.yaml").read_text())
    values = flags.FlagValues()
    for name in ("config", "model"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    values(["test", f"--config={path}", "--model=here"])
    monkeypatch.chdir(ROOT)
    config = options.engine_config(values, options.read_config(values))
    assert config.mesh == MeshConfig(stage=4, tensor_parallel=2)
    assert config.max_rows == 256
