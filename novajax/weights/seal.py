"""Makes a sealed checkpoint of a loaded model: arrays, side files and the manifest, all or nothing.

Invariants: everything is written beside the output and renamed at the end, so an output that exists is whole; nothing is
overwritten; on any failure nothing is left.
"""

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from novajax.core.errors import CapacityError, ConfigError, WeightsError
from novajax.models.decoder import abstract_model
from novajax.models.precision import quantized_state
from novajax.quant.profile_file import Rules
from novajax.telemetry.progress import Progress, Report, quantity
from novajax.weights.load import LoadedModel, load_model
from novajax.weights.manifest import ARRAYS, Manifest, array_name, list_files, spec_digest, write_manifest
from novajax.weights.orbax import save_arrays

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
)
"""Copied beside the arrays: what serving needs, and the terms the weights came under."""
SPARE_BYTES = 64 << 20
"""Left free on the disk."""


def check_output(output: Path, size_bytes: int) -> None:
    """Refuses an output that exists, cannot be made, or does not fit on its disk, before anything is loaded."""
    if output.exists():
        raise ConfigError(f"{output} exists already; nothing is overwritten", param="output")
    if not output.parent.is_dir():
        raise ConfigError(f"{output.parent}: no such directory", param="output")
    free_bytes = shutil.disk_usage(output.parent).free
    if free_bytes < size_bytes + SPARE_BYTES:
        raise CapacityError(f"{output} needs {quantity(size_bytes, 'B')}; the disk has {quantity(free_bytes, 'B')} free", param="output")


def seal(
    loaded: LoadedModel, output: Path, *, profile: str = "", rules: Rules = (), progress: Report = Progress, verify: bool = False
) -> Manifest:
    """Writes `loaded` to `output`. With `verify`, what was written is loaded again and compared bit for bit first.

    Quantized weights need the `rules` they were quantized by, and a name for them: who loads the directory makes the same tree of them.
    Raises WeightsError, ConfigError or CapacityError; the output does not exist then.
    """
    _, plain = nnx.split(abstract_model(loaded.config, loaded.dtype))
    if spec_digest(quantized_state(plain, rules, on_cpu=True) if rules else plain) != spec_digest(loaded.state):
        raise ConfigError(f"the weights are not those of the precision profile {profile or 'float'}", param="quantization")
    check_output(output, loaded.bytes)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        with progress(loaded.bytes, "B", "write arrays") as shown:
            save_arrays(partial / ARRAYS, loaded.state, shown)
        for pattern in SIDE_FILES:
            for path in loaded.directory.glob(pattern):
                shutil.copyfile(path, partial / path.name)
        manifest = Manifest(
            version=version("novajax"),
            source=_origin(loaded),
            model=loaded.config,
            dtype=str(loaded.dtype),
            parameters=sum(variable.get_value().size for _, variable in nnx.to_flat_state(loaded.state)),
            spec_digest=spec_digest(loaded.state),
            profile=profile,
            rules=rules,
            files=list_files(partial),
        )
        write_manifest(partial, manifest)
        if verify:
            compare(loaded, partial, progress)
        partial.rename(output)
    except OSError as error:
        raise WeightsError(f"{output}: {error.strerror or error}", param="output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def compare(loaded: LoadedModel, directory: Path, progress: Report = Progress) -> None:
    """Refuses, by name, a parameter of the sealed `directory` whose bits differ, or that is not all finite numbers.

    Holds the model twice while it runs.
    """
    mesh = jax.tree.leaves(loaded.state)[0].sharding.mesh
    again = dict(nnx.to_flat_state(load_model(directory, mesh, loaded.dtype, progress=progress).state))
    for path, variable in nnx.to_flat_state(loaded.state):
        for ours, sealed in zip(_shards(variable), _shards(again[path]), strict=True):
            bits = np.dtype(f"u{ours.dtype.itemsize}")
            if ours.dtype != sealed.dtype or not np.array_equal(ours.view(bits), sealed.view(bits)):
                raise WeightsError(f"{array_name(path)}: what was written is not what was loaded")
            if not np.isfinite(ours.astype(np.float32)).all():
                raise WeightsError(f"{array_name(path)}: holds values that are not finite numbers")


def _shards(variable: nnx.Variable) -> list[np.ndarray]:
    return [np.asarray(shard.data) for part in jax.tree.leaves(variable.get_value()) for shard in part.addressable_shards]


def _origin(loaded: LoadedModel) -> str:
    manifest = loaded.description.manifest
    return loaded.description.source.pinned if manifest is None else manifest.source
