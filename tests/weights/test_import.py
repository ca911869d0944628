import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from weight_files import NANO, assert_same, copy_nano, expected_state, split, state_arrays, tensors_of

from novajax.core.errors import ConfigError, WeightsError
from novajax.parallel.mesh import make_mesh
from novajax.telemetry.progress import Silent
from novajax.weights import importer
from novajax.weights.load import LoadedModel, load_model
from novajax.weights.safetensors import SINGLE, SafetensorsDirectory

FAMILIES = sorted(path.parent.name for path in NANO.glob("*/config.json"))


def load(directory: Path, dtype: str = "float32", *, verify: bool = True) -> LoadedModel:
    return load_model(directory, make_mesh(devices=jax.devices()[:1]), dtype, progress=Silent, verify=verify)


def change_tensors(directory: Path, change) -> Path:
    tensors = tensors_of(directory)
    change(tensors)
    save_file(tensors, directory / SINGLE)
    return directory


def as_dtype(state: dict[str, np.ndarray], dtype) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float32).astype(dtype) for name, value in state.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_bit_for_bit(name: str):
    loaded = load(NANO / name)
    assert_same(state_arrays(loaded.state), as_dtype(expected_state(NANO / name), np.float32))
    assert loaded.bytes == sum(value.nbytes for value in state_arrays(loaded.state).values())


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3", "llama_linear_bias"])
@pytest.mark.parametrize("piece_bytes", [40, 300, 5000])
def test_the_size_of_the_pieces_does_not_matter(name: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importer, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(importer, "IN_FLIGHT_BYTES", 1)
    assert_same(state_arrays(load(NANO / name).state), as_dtype(expected_state(NANO / name), np.float32))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_every_change_of_dtype_rounds_once(tmp_path: Path, stored, wanted: str):
    directory = copy_nano("llama3", tmp_path)
    change_tensors(directory, lambda tensors: tensors.update({name: value.astype(stored) for name, value in tensors.items()}))
    assert_same(state_arrays(load(directory, wanted).state), as_dtype(expected_state(directory), jnp.dtype(wanted)))


def test_special_values_survive(tmp_path: Path):
    bits = np.array([0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x8000, 0x7F7F], np.uint16)
    directory = copy_nano("llama3", tmp_path)

    def put(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()})
        tensors["model.norm.weight"].view(np.uint16)[: len(bits)] = bits

    loaded = state_arrays(load(change_tensors(directory, put)).state)
    assert (loaded["final_norm.scale"].view(np.uint32)[: len(bits)] == bits.astype(np.uint32) << 16).all()


def test_sharded_equals_single(tmp_path: Path):
    loaded = load(split(copy_nano("mixtral", tmp_path), 4))
    assert_same(state_arrays(loaded.state), as_dtype(expected_state(NANO / "mixtral"), np.float32))


def rename(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


NORM = "model.norm.weight"
REFUSED = {
    "an unknown tensor": (
        "llama3",
        lambda t: t.update(ghost=np.ones(3, np.float32)),
        r"model.safetensors: the tensor 'ghost' belongs to no",
    ),
    "a layer too many": (
        "llama3",
        lambda t: t.update({"model.layers.9.input_layernorm.weight": t[NORM]}),
        r"'model.layers.9.input_layernorm.weight' would be layers.9.attention_norm.scale, which this model does not have",
    ),
    "a bias that config.json denies": (
        "llama3",
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}),
        r"layers.0.attention.q_bias, which this model does not have",
    ),
    "a missing tensor": ("llama3", lambda t: t.pop(NORM), r"parameter final_norm.scale cannot be filled: no tensor is for it"),
    "a missing expert": (
        "mixtral",
        lambda t: t.pop(next(name for name in t if ".experts.1." in name)),
        r"cannot be filled: 3 of its 4 tensors are there",
    ),
    "an expert too many": (
        "mixtral",
        lambda t: t.update({name.replace(".experts.1.", ".experts.7."): t[name] for name in list(t) if ".experts.1." in name}),
        r"is beyond the \[4, ",
    ),
    "another shape": (
        "llama3",
        lambda t: t.update({NORM: np.ones(31, np.float32)}),
        r"'model.norm.weight' has shape \[31\]; config.json makes it",
    ),
    "transposed": (
        "llama3",
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].T.copy()}),
        r"'model.layers.0.mlp.up_proj.weight' has shape",
    ),
    "another dtype": ("llama3", lambda t: t.update({NORM: t[NORM].astype(np.int8)}), r"'model.norm.weight' is I8: not a weight's dtype"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str):
    name, change, why = REFUSED[case]
    with pytest.raises(WeightsError, match=why):
        load(change_tensors(copy_nano(name, tmp_path), change))


def test_known_and_unneeded_tensors_are_let_pass(tmp_path: Path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    directory = change_tensors(copy_nano("llama3", tmp_path), lambda tensors: tensors.update(extra))
    assert_same(state_arrays(load(directory).state), state_arrays(load(NANO / "llama3").state))


def test_a_tied_model_ignores_the_spare_head(tmp_path: Path):
    directory = copy_nano("llama3", tmp_path)
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    change_tensors(directory, lambda tensors: tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"]))
    with_spare = state_arrays(load(directory).state)
    assert "head" not in with_spare
    change_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    assert_same(state_arrays(load(directory).state), with_spare)


def test_an_untied_model_needs_its_head(tmp_path: Path):
    directory = copy_nano("llama3", tmp_path)
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    change_tensors(directory, lambda tensors: tensors.pop("lm_head.weight", None))
    with pytest.raises(WeightsError, match="parameter head cannot be filled"):
        load(directory)


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config lacks 'bits'", "quantization_config"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map", "auto_map"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers", "num_hidden_layers"),
        ({"head_dim": 0}, "head_dim", "head_dim"),
        ({"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta", "rope_theta"),
        ({"model_type": "nonesuch"}, "model_type", "model_type"),
        ({"num_hidden_layers": None}, "num_hidden_layers", "num_hidden_layers"),
    ],
)
def test_a_bad_config_is_refused_by_its_key(tmp_path: Path, change: dict, error: str, param: str):
    directory = copy_nano("llama2", tmp_path)
    config = json.loads((directory / "config.json").read_text()) | change
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=error) as refused:
        load(directory)
    assert refused.value.param == param


@pytest.mark.parametrize("text", [None, "", "{", "[]", "[" * 100_000, "\xff\xfe"])
def test_config_json_is_missing_or_no_object(tmp_path: Path, text: str | None):
    directory = copy_nano("llama2", tmp_path)
    (directory / "config.json").unlink()
    if text is not None:
        (directory / "config.json").write_text(text, "latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(directory)


def test_the_digest_is_of_the_content(tmp_path: Path):
    first = load(copy_nano("llama3", tmp_path))
    assert load(NANO / "llama3").digest == first.digest, "where it lies does not matter"
    assert load(tmp_path, "bfloat16").digest != first.digest
    data = bytearray((tmp_path / SINGLE).read_bytes())
    data[-1] ^= 1
    (tmp_path / SINGLE).write_bytes(data)
    assert load(tmp_path).digest != first.digest
    assert load(tmp_path, verify=False).digest.startswith("unverified:")


def test_a_blob_of_the_hub_cache_must_have_its_name(tmp_path: Path):
    copy_nano("llama3", tmp_path)
    blob = tmp_path / ("0" * 64)
    (tmp_path / SINGLE).rename(blob)
    (tmp_path / SINGLE).symlink_to(blob)
    with pytest.raises(WeightsError, match=f"{SINGLE}: sha256 differs from the hub's"):
        load(tmp_path)
    assert load(tmp_path, verify=False).bytes


def test_a_failure_in_a_thread_stops_the_load(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> np.ndarray:
        raise WeightsError("the disk went away")

    monkeypatch.setattr(SafetensorsDirectory, "read", fail)
    with pytest.raises(WeightsError, match="the disk went away"):
        load(NANO / "mixtral")


def test_on_eight_devices_every_family_is_the_same():
    script = Path(__file__).with_name("load_on_mesh.py")
    done = subprocess.run([sys.executable, str(script), *FAMILIES], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == FAMILIES


def test_layers_stacked_over_stages_are_the_same(tmp_path):
    names, forms = ["llama3", "qwen3_moe"], ["int8", "int4-32", "fp8", "memory_critical"]
    script = Path(__file__).with_name("staged_on_mesh.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path), *names], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.split() if line in (*names, *forms)] == names + forms
