"""Profiles are the planner's table, rule by rule; what no rule names is refused."""

import msgspec
import pytest
from flax import nnx

from novajax.core.errors import ConfigError
from novajax.models.config import ModelConfig
from novajax.models.precision import quantized_model, quantized_state
from novajax.models.sizes import model_sizes
from novajax.models.stages import staged_model
from novajax.planner.formats import profile
from novajax.planner.memory import model_bytes
from novajax.quant.formats import parse
from novajax.quant.profiles import format_of, rules_of
from novajax.quant.qtensor import QTensor, stored_bytes
from novajax.weights.describe import describe

NANO = "tests/data/nano/"
TABLE = {
    "memory_critical": ("int8-a8", "int4-128-a8", "int8-a8", "int4-128-a8", None),
    "balanced": (None, "int8-w", None, "int8-w", None),
    "quality_critical": (None, None, None, None, None),
}
PATHS = ("embed", "layers/11/attention/k", "layers/0/attention/o", "layers/3/mlp/down", "head")


@pytest.mark.parametrize("name", TABLE)
def test_the_named_profiles(name):
    rules = rules_of(name, tied=False)
    formats = [format_of(rules, path, on_cpu=False) for path in PATHS]
    assert tuple(form.name if form else None for form in formats) == TABLE[name]
    for path in ("final_norm/scale", "layers/0/attention/q_norm/scale", "layers/0/attention/q_bias", "layers/1/mlp/router"):
        assert format_of(rules, path, on_cpu=False) is None


def test_a_tied_embedding_has_the_heads_format():
    assert format_of(rules_of("memory_critical", tied=True), "embed", on_cpu=True) is None


def test_a_format_is_for_the_layers_and_the_first_rule_wins():
    assert [format_of(rules_of("int4-32", tied=False), path, on_cpu=True) for path in PATHS] == [None, *[parse("int4-32-a8")] * 3, None]
    mine = ((r"layers/0/.*/down", "float"), (r"layers/\d+/mlp/.*", "int8-w"))
    assert format_of(mine, "layers/0/mlp/down", on_cpu=True) is None
    assert format_of(mine, "layers/1/mlp/down", on_cpu=True) == parse("int8-w")
    with pytest.raises(ConfigError, match="no rule of the precision profile matches the parameter layers/1/attention/q"):
        format_of(mine, "layers/1/attention/q", on_cpu=True)


def test_refusals():
    with pytest.raises(ConfigError, match=r"'int5' is not known.*profiles: float32, bf16"):
        rules_of("int5", tied=False)
    cfg = config("llama2")
    with pytest.raises(ConfigError, match="keeps embedding, norm, head in float32"):
        quantized_model(cfg, 1, "bfloat16", "quality_critical", on_cpu=False)
    _, state = staged_model(cfg, 1)
    with pytest.raises(ConfigError, match="only matrices can be quantized"):
        quantized_state(state, ((".*", "int8"),), on_cpu=True)


def config(name: str) -> ModelConfig:
    return describe(NANO + name).config


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "balanced", "memory_critical"])
@pytest.mark.parametrize("model", ["llama2", "qwen3_moe", "gemma3"])
def test_bytes_are_the_planners(model, name):
    """Of a model in bfloat16, with every scale."""
    cfg = config(model)
    _, state = quantized_model(cfg, 1, "bfloat16", name, on_cpu=False)
    ours = sum(stored_bytes(leaf.shape, leaf.dtype) for _, variable in nnx.to_flat_state(state) for leaf in arrays(variable))
    planned = profile(name)
    if cfg.tied_embedding:
        planned = msgspec.structs.replace(planned, embedding=planned.head)
    assert ours == model_bytes(model_sizes(cfg), planned)


def arrays(variable):
    held = variable.get_value()
    return (held.values, held.scale) if isinstance(held, QTensor) else (held,)
