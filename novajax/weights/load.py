"""One way to get a model onto devices, whatever it was stored as: a Hugging Face directory, a hub id or a sealed checkpoint.

Invariants: the digest identifies what was loaded (structure, dtype and the content of the files), unless `verify` was
off, and then it says so. It does not know engines, tokenizers or requests.
"""

import dataclasses
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import structlog
from flax import nnx
from jax.sharding import Mesh

from novajax.core.errors import ConfigError, WeightsError
from novajax.models.config import ModelConfig
from novajax.models.families.registry import key_map
from novajax.models.precision import quantized_model
from novajax.models.stages import stage_places
from novajax.quant.qtensor import stored_bytes
from novajax.quant.spread import state_shardings
from novajax.telemetry.progress import Progress, Report
from novajax.weights.describe import Description, describe
from novajax.weights.foreign import PackedDirectory
from novajax.weights.hashing import FileHashes
from novajax.weights.importer import import_leaves, source_bytes
from novajax.weights.leaves import plan_leaves
from novajax.weights.manifest import ARRAYS, Manifest, check_hash, is_array, spec_digest
from novajax.weights.orbax import restore_arrays
from novajax.weights.rounding import Requantized, Rounding
from novajax.weights.safetensors import SafetensorsDirectory

__all__ = ["Description", "LoadedModel", "describe", "load_model"]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on its devices: `nnx.merge(graphdef, state)` is the decoder."""

    description: Description
    graphdef: nnx.GraphDef[Any]
    state: nnx.State
    dtype: jnp.dtype
    digest: str
    """sha256 over structure, dtype and file contents; "unverified:..." over names, sizes and times when `verify` was off."""
    bytes: int
    """Of the arrays, once, however many devices hold copies."""
    seconds: float
    requantized: Requantized | None = None
    """What became of the numbers of a checkpoint that others quantized; None: it was not, or is held as float."""

    @property
    def config(self) -> ModelConfig:
        return self.description.config

    @property
    def directory(self) -> Path:
        """Holds tokenizer.json and the other side files."""
        return self.description.directory

    @property
    def default_sampling(self) -> dict[str, float | int]:
        return self.description.default_sampling

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        return self.description.end_token_ids


def load_model(
    source: str | Path | Description,
    mesh: Mesh,
    dtype: Any = None,
    *,
    quantization: str = "",
    progress: Report = Progress,
    verify: bool = True,
) -> LoadedModel:
    """Loads a model onto `mesh` in `dtype` (None: float32 on CPU devices, bfloat16 elsewhere), its weights quantized on the way
    by a profile or format if `quantization` names one (`quant.profiles`).

    With `verify`, every file is read once more to hash it, beside the load: a sealed checkpoint and a file of the hub's
    cache are refused, by name, when the hash is not the recorded one; of other directories it only makes the digest.

    Raises WeightsError or ConfigError naming the file, tensor or key.
    """
    started_s = time.monotonic()
    description = source if isinstance(source, Description) else describe(source)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if dtype is None:
        dtype = jnp.float32 if on_cpu else jnp.bfloat16
    manifest = description.manifest
    if quantization and manifest is not None:
        held = manifest.profile or manifest.dtype
        raise ConfigError(f"{description.directory} is sealed in {held}: it is served as it is; quantize its source", param="quantization")
    dtype = jnp.dtype(dtype)
    stages = mesh.shape["stage"]
    graphdef, state = quantized_model(description.config, stages, dtype, quantization, on_cpu=on_cpu, rules=description.rules)
    shardings = state_shardings(mesh, state)
    requantized = None
    if manifest is None:
        rounding = Rounding()
        state, content = _import(description, state, shardings, stages, progress, verify, rounding)
        if (requantized := rounding.result()) is not None:
            structlog.get_logger().info(str(requantized), model=str(description.directory))
    else:
        state = _restore(description.directory, manifest, state, shardings, stages, progress, verify)
        content = [manifest.digest]
    digest = hashlib.sha256(
        msgspec.json.encode((description.config, str(dtype), content, *([quantization] if quantization else [])))
    ).hexdigest()
    size_bytes = sum(stored_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
    seconds = time.monotonic() - started_s
    named = digest if verify else f"unverified:{digest}"
    return LoadedModel(description, graphdef, state, dtype, named, size_bytes, seconds, requantized)


def _import(
    description: Description, state: nnx.State, shardings: nnx.State, stages: int, progress: Report, verify: bool, rounding: Rounding
) -> tuple[nnx.State, list[Any]]:
    packed = description.packed
    with PackedDirectory(description.directory, packed) if packed else SafetensorsDirectory(description.directory) as directory:
        places = stage_places(description.config, stages)
        leaves = plan_leaves(directory, key_map(description.foreign, description.config), state, shardings, places)
        paths = [directory.directory / file for file in directory.files]
        with FileHashes(paths if verify else ()) as hashes, progress(source_bytes(directory, leaves), "B", "load weights") as shown:
            arrays = dict(import_leaves(directory, leaves, shown, rounding))
            shown.note("waiting for sha256")
            content = [[path.name, _checked_hash(path, hashes)] for path in paths] if verify else [_stat(path) for path in paths]
    filled = [(path, variable.replace(arrays[path])) for path, variable in nnx.to_flat_state(state)]
    return nnx.from_flat_state(filled), content


def _restore(
    directory: Path, manifest: Manifest, state: nnx.State, shardings: nnx.State, stages: int, progress: Report, verify: bool
) -> nnx.State:
    _, sealed = quantized_model(manifest.model, 1, jnp.dtype(manifest.dtype), "", on_cpu=True, rules=manifest.rules)
    if spec_digest(sealed) != manifest.spec_digest:
        raise WeightsError(f"{directory}: sealed by version {manifest.version} with another parameter tree: convert the model again")
    entries = [entry for entry in manifest.files if is_array(entry.path)]
    of_array: dict[str, list[Any]] = {}
    for entry in entries:
        of_array.setdefault(entry.path.split("/")[1], []).append(entry)
    total_bytes = sum(entry.size_bytes for entry in entries)
    with FileHashes(directory / entry.path for entry in entries if verify) as hashes:
        with progress(total_bytes, "B", "load weights") as shown:

            def check(name: str) -> None:
                if name not in of_array:
                    raise WeightsError(f"{directory / ARRAYS / name}: missing; no file of it is in the manifest")
                for entry in of_array[name] if verify else ():
                    check_hash(directory, entry, hashes)

            return restore_arrays(directory / ARRAYS, state, shardings, manifest.dtype, shown, check, stage_places(manifest.model, stages))


def _checked_hash(path: Path, hashes: FileHashes) -> str:
    """The file's sha256; a file of the hub's cache is a link to a blob that is named by it."""
    digest = hashes.wait(path)
    blob = path.readlink().name if path.is_symlink() else ""
    if len(blob) == 64 and all(letter in "0123456789abcdef" for letter in blob) and blob != digest:
        raise WeightsError(f"{path}: sha256 differs from the hub's: corrupt; delete it to fetch it again")
    return digest


def _stat(path: Path) -> list[Any]:
    stat = os.stat(path)
    return [path.name, stat.st_size, stat.st_mtime_ns]
