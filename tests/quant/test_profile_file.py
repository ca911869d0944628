"""A profile file says again what was written, and one that is not understood, or is for other layers, is refused by name."""

import jax.numpy as jnp
import msgspec
import pytest
from flax import nnx

from novajax.core.errors import ConfigError
from novajax.models.precision import quantized_model
from novajax.quant.profile_file import ProfileFile, read_profile, write_profile
from novajax.quant.qtensor import QTensor
from novajax.weights.describe import describe

RULES = ((r"layers/0/mlp/down", "int8-w"), (r"layers/\d+/mlp/.*", "int4-32-w"), (r".*", "float"))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "profile.json"
    write_profile(path, ProfileFile(model="nano", rules=RULES))
    return path


def test_a_file_is_a_quantization(path):
    assert read_profile(path).rules == RULES
    cfg = describe("tests/data/nano/llama2").config
    _, state = quantized_model(cfg, 1, jnp.float32, str(path), on_cpu=True)
    forms = {
        "/".join(map(str, name)): held.format.name
        for name, variable in nnx.to_flat_state(state)
        if isinstance(held := variable.get_value(), QTensor)
    }
    assert forms["layers/0/mlp/down"] == "int8-w"
    assert forms["layers/1/mlp/down"] == forms["layers/0/mlp/up"] == "int4-32-w"
    assert len(forms) == 3 * len(cfg.layers)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rules": [["layers/(", "int8"]]}, r"'layers/\(': no regular expression"),
        ({"rules": [["embed", "int5"]]}, r"rule 'embed': quantization format 'int5'"),
        ({"version": 2}, "version 2, known: 1"),
        ({"more": 1}, "unknown field `more`"),
    ],
)
def test_what_is_not_understood(path, change, match):
    path.write_bytes(msgspec.json.encode(msgspec.to_builtins(read_profile(path)) | change))
    with pytest.raises(ConfigError, match=f"profile.json.*{match}"):
        read_profile(path)


def test_other_layers(path):
    cfg = describe("tests/data/nano/llama2").config
    write_profile(path, ProfileFile(model="deep", rules=((r"layers/90/mlp/down", "int8"), *RULES)))
    with pytest.raises(ConfigError, match=r"profile.json is for another model: no parameter here is layers/90/mlp/down"):
        quantized_model(cfg, 1, jnp.float32, str(path), on_cpu=True)
    write_profile(path, ProfileFile(model="shallow", rules=RULES[:1]))
    with pytest.raises(ConfigError, match="no rule of the precision profile matches the parameter embed"):
        quantized_model(cfg, 1, jnp.float32, str(path), on_cpu=True)


def test_layers_in_one_slot_of_two_stages_need_one_format(path):
    cfg = describe("tests/data/nano/llama2").config
    with pytest.raises(ConfigError, match="layers/0/mlp/down and layers/1/mlp/down different formats"):
        quantized_model(cfg, len(cfg.layers), jnp.float32, str(path), on_cpu=True)
