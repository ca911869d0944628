"""Quantizing while loading: the bits of the plain form, on any mesh, in little memory; what cannot be quantized is refused."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from weight_files import NANO, copy_nano, expected_state, tensors_of

from novajax.core.errors import WeightsError
from novajax.engine.build import device_bytes
from novajax.models.precision import quantized_model
from novajax.parallel.mesh import make_mesh
from novajax.quant.aqt import quantize
from novajax.quant.qtensor import QTensor
from novajax.quant.spread import state_shardings
from novajax.telemetry.progress import Silent
from novajax.weights import quantizing
from novajax.weights.load import load_model


@pytest.mark.parametrize("piece_bytes", [32 << 20, 2048], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", ["int8", "int4-32", "fp8"])
@pytest.mark.parametrize("model", ["llama2", "qwen3_moe"])
def test_a_leaf_is_what_aqt_makes_of_the_whole_array(model, name, piece_bytes, monkeypatch):
    monkeypatch.setattr(quantizing, "PIECE_BYTES", piece_bytes)
    wanted = expected_state(NANO / model)
    loaded = load_model(NANO / model, make_mesh(), "float32", quantization=name, progress=Silent)
    quantized = 0
    for path, variable in nnx.to_flat_state(loaded.state):
        held, whole = variable.get_value(), wanted[".".join(map(str, path))]
        if not isinstance(held, QTensor):
            np.testing.assert_array_equal(np.asarray(held), whole.astype(np.float32))
            continue
        quantized += 1
        values, scale = quantize(jnp.asarray(whole, jnp.float32), held.block, held.format.kind)
        np.testing.assert_array_equal(np.asarray(held.values, np.float32), np.asarray(values, np.float32))
        np.testing.assert_array_equal(np.asarray(held.scale), np.asarray(scale))
    assert quantized == 7 * len(loaded.config.layers)


def test_bytes_and_digest():
    plain = load_model(NANO / "llama2", make_mesh(), "float32", progress=Silent)
    small = load_model(NANO / "llama2", make_mesh(), "float32", quantization="int8", progress=Silent)
    assert small.digest != plain.digest
    assert small.bytes < plain.bytes
    _, abstract = quantized_model(plain.config, 1, jnp.float32, "int8", on_cpu=True)
    assert device_bytes(state_shardings(make_mesh(), abstract), abstract) == small.bytes


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, bad):
    directory = copy_nano("llama2", tmp_path)
    tensors = tensors_of(directory)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = tensors[name].copy()
    tensors[name][3, 1] = bad
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up: holds values that are not finite"):
        load_model(directory, make_mesh(), "float32", quantization="int8", progress=Silent)


@pytest.mark.parametrize("model", ["llama2", "mixtral"])
def test_eight_devices_hold_the_same_bits(model):
    script = Path(__file__).with_name("quantized_on_mesh.py")
    done = subprocess.run([sys.executable, str(script), str(NANO / model)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["int8", "int4-32", "memory_critical"]
