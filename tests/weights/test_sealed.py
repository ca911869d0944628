import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file
from weight_files import NANO, assert_same, copy_nano, expected_state, state_arrays, tensors_of

from novajax.convert import convert
from novajax.core.errors import CapacityError, ConfigError, WeightsError
from novajax.parallel.mesh import make_mesh
from novajax.quant.profiles import rules_of
from novajax.telemetry.progress import Silent
from novajax.weights import orbax, seal
from novajax.weights.load import load_model
from novajax.weights.manifest import MANIFEST, Manifest, is_array, read_manifest
from novajax.weights.safetensors import SINGLE

SIDE = {"generation_config.json": {"temperature": 0.5, "eos_token_id": 2}, "tokenizer_config.json": {"chat_template": "{{ messages }}"}}


def load(directory: Path, dtype: str = "float32", *, verify: bool = True):
    return load_model(directory, make_mesh(devices=jax.devices()[:1]), dtype, progress=Silent, verify=verify)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = copy_nano("mixtral", tmp_path_factory.mktemp("source"))
    for name, value in SIDE.items():
        (directory / name).write_text(json.dumps(value))
    (directory / "README.md").write_text("not copied")
    return directory


@pytest.fixture(scope="module")
def kept(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kept") / "sealed"
    convert(str(source), output, "float32", "", verify=True, progress=Silent)
    return output


@pytest.fixture
def sealed(kept: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(kept, tmp_path / "sealed"))


def array_file(directory: Path, name: str = "layers.1.attention.q") -> Path:
    return max((directory / "arrays" / name).iterdir(), key=lambda path: path.stat().st_size)


def test_a_round_trip_is_equal_bit_for_bit(source: Path, kept: Path):
    first, again = load(source), load(kept)
    assert_same(state_arrays(again.state), state_arrays(first.state))
    assert (again.config, again.end_token_ids, again.default_sampling) == (first.config, (2,), {"temperature": 0.5})
    assert {path.name for path in kept.iterdir()} == {"arrays", MANIFEST, "config.json", *SIDE}
    assert [path.name for path in kept.parent.iterdir()] == ["sealed"], "nothing is left beside it"


def test_the_stored_type_can_be_loaded_as_another(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert(str(source), tmp_path / "half", "bfloat16", "", verify=True, progress=Silent)
    monkeypatch.setattr(orbax, "GROUP_BYTES", 5000)
    wanted = {name: value.astype(jnp.bfloat16) for name, value in expected_state(NANO / "mixtral").items()}
    assert_same(state_arrays(load(tmp_path / "half", "bfloat16").state), wanted)
    assert_same(state_arrays(load(tmp_path / "half").state), {name: value.astype(np.float32) for name, value in wanted.items()})


def test_two_seals_of_equal_weights_have_one_digest(source: Path, kept: Path, tmp_path: Path):
    summary = convert(str(kept), tmp_path / "again", "auto", "", verify=False, progress=Silent)
    manifest = read_manifest(kept)
    assert manifest is not None
    assert summary.digest == manifest.digest
    assert summary.dtype == "float32"
    assert summary.source == source.name, "the first origin is kept"
    assert load(tmp_path / "again").digest == load(kept).digest
    assert convert(str(source), tmp_path / "half", "bfloat16", "", verify=False, progress=Silent).digest != manifest.digest


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_named(sealed: Path):
    damage(array_file(sealed))
    with pytest.raises(WeightsError, match=r"arrays/layers.1.attention.q/0.0.0: sha256 differs from manifest.json"):
        load(sealed)
    assert load(sealed, verify=False).digest.startswith("unverified:")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "arrays/layers.1.attention.q/.zarray"])
def test_a_damaged_side_file_is_named(sealed: Path, name: str):
    damage(sealed / name)
    with pytest.raises(WeightsError, match=f"{name}: sha256 differs"):
        load(sealed)


def test_a_missing_file_is_named(sealed: Path):
    array_file(sealed).unlink()
    with pytest.raises(WeightsError, match=r"layers.1.attention.q/0.0.0: missing; manifest.json names it"):
        load(sealed)


def test_a_cut_file_is_named(sealed: Path):
    os.truncate(array_file(sealed), 10)
    with pytest.raises(WeightsError, match=r"layers.1.attention.q/0.0.0: 10 bytes, manifest.json says 4,096"):
        load(sealed, verify=False)


def test_a_file_nobody_sealed_is_named(sealed: Path):
    (sealed / "arrays" / "layers.1.attention.q" / "0.0.1").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"0.0.1: manifest.json does not name it"):
        load(sealed)


def test_a_missing_manifest_is_told(sealed: Path):
    (sealed / MANIFEST).unlink()
    with pytest.raises(WeightsError, match=r"manifest.json: missing, but arrays/ of a sealed checkpoint is there"):
        load(sealed)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', "\xff"])
def test_a_cut_manifest(sealed: Path, text: str):
    (sealed / MANIFEST).write_text(text, "latin-1")
    with pytest.raises(WeightsError, match=r"manifest.json: cut or corrupt"):
        load(sealed)


def change_manifest(directory: Path, **changes) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(manifest | changes))


def test_a_later_format_is_refused(sealed: Path):
    change_manifest(sealed, format=2, model="of another form")
    with pytest.raises(WeightsError, match="format 2; this version reads format 1"):
        load(sealed)


def test_another_parameter_tree_is_refused(sealed: Path):
    change_manifest(sealed, spec_digest="0" * 64)
    with pytest.raises(WeightsError, match="another parameter tree: convert the model again"):
        load(sealed)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "arrays/../../outside", ""])
def test_a_manifest_cannot_lead_out_of_the_directory(sealed: Path, path: str):
    change_manifest(sealed, files=[{"path": path, "size_bytes": 1, "sha256": "0" * 64}])
    with pytest.raises(WeightsError, match="not inside the directory"):
        load(sealed)


def test_the_manifest_is_itself_again(kept: Path):
    manifest = read_manifest(kept)
    assert manifest is not None
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest) == manifest


def test_an_output_that_exists_is_not_touched(source: Path, tmp_path: Path):
    (tmp_path / "there").mkdir()
    for output, error in ((tmp_path / "there", "exists already"), (tmp_path / "no" / "parent", "no such directory")):
        with pytest.raises(ConfigError, match=error):
            convert(str(source), output, "auto", "", verify=False, progress=Silent)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("profile", ["int8", "int4-32", "memory_critical", "fp8"])
def test_quantized_weights_come_back_bit_for_bit(source: Path, tmp_path: Path, profile: str):
    """As they are when the float checkpoint is quantized while it is loaded, also on a mesh; int4 takes half a byte on disk too."""
    convert(str(source), tmp_path / "out", "auto", profile, verify=True, progress=Silent)
    mesh = make_mesh(devices=jax.devices()[:1])
    wanted = load_model(source, mesh, "float32", quantization=profile, progress=Silent)
    found = load_model(tmp_path / "out", mesh, "float32", progress=Silent)
    assert jax.tree.structure(found.state) == jax.tree.structure(wanted.state)
    for one, other in zip(jax.tree.leaves(found.state), jax.tree.leaves(wanted.state), strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.profile == profile
    arrays = [entry.size_bytes for entry in manifest.files if is_array(entry.path)]
    assert sum(arrays) < found.bytes + 500 * len(arrays)
    with pytest.raises(ConfigError, match=f"is sealed in {profile}: it is served as it is"):
        load_model(tmp_path / "out", mesh, "float32", quantization="int8", progress=Silent)


def test_quantized_weights_of_another_profile_are_not_sealed(source: Path, tmp_path: Path):
    quantized = load_model(source, make_mesh(devices=jax.devices()[:1]), "float32", quantization="int8", progress=Silent)
    for profile in ("", "int4"):
        rules = rules_of(profile, tied=False) if profile else ()
        with pytest.raises(ConfigError, match=f"not those of the precision profile {profile or 'float'}"):
            seal.seal(quantized, tmp_path / "out", profile=profile, rules=rules, progress=Silent)
    assert not (tmp_path / "out").exists()


def test_a_profile_that_was_changed_is_refused(source: Path, tmp_path: Path):
    convert(str(source), tmp_path / "out", "auto", "int8", verify=False, progress=Silent)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    changed = msgspec.structs.replace(manifest, rules=rules_of("int4", tied=False))
    (tmp_path / "out" / MANIFEST).write_bytes(msgspec.json.encode(changed))
    with pytest.raises(WeightsError, match="another parameter tree"):
        load(tmp_path / "out")


def test_what_does_not_fit_on_the_disk_is_refused_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(seal.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CapacityError, match=r"the disk has 1\.0 kB free"):
        convert(str(source), tmp_path / "out", "auto", "", verify=False, progress=Silent)


def test_a_failure_midway_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seal, "write_manifest", full)
    with pytest.raises(WeightsError, match="No space left on device"):
        convert(str(source), tmp_path / "out", "auto", "", verify=False, progress=Silent)
    assert not list(tmp_path.iterdir())


def test_verify_refuses_what_is_not_finite(tmp_path: Path):
    (tmp_path / "in").mkdir()
    directory = copy_nano("llama3", tmp_path / "in")
    tensors = tensors_of(directory)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, directory / SINGLE)
    with pytest.raises(WeightsError, match=r"final_norm.scale: holds values that are not finite"):
        convert(str(directory), tmp_path / "out", "auto", "", verify=True, progress=Silent)
    assert not (tmp_path / "out").exists()


def run_convert(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "novajax.convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_the_command(source: Path, tmp_path: Path):
    done = run_convert(f"--model={source}", f"--output={tmp_path / 'out'}", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["parameters"] == 51616
    assert summary["dtype"] == "bfloat16", "auto keeps what is stored"
    assert "load weights: " in done.stderr
    assert "Checkpoint" not in done.stderr, "Orbax's own log is not shown"
    assert load(tmp_path / "out").bytes == 4 * 51616


@pytest.mark.parametrize("arguments", [(), ("--model=/no/such/place", "--output=out")])
def test_the_command_refuses(arguments: tuple[str, ...]):
    done = run_convert(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "needed" in done.stdout + done.stderr or "neither a directory here" in done.stderr
