"""Run by test_import.py in a process of its own: layers stacked over pipeline stages hold what the single layers hold, from a
Hugging Face directory and from a sealed checkpoint alike, also quantized; a stage without a layer has zeros."""

import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from weight_files import NANO

from novajax.models.stages import stage_places
from novajax.parallel.mesh import make_mesh
from novajax.quant.profiles import rules_of
from novajax.quant.qtensor import QTensor
from novajax.telemetry.progress import Silent
from novajax.weights.load import load_model
from novajax.weights.seal import seal

STAGES = 2


def arrays(loaded) -> dict:
    return {path: variable.get_value() for path, variable in nnx.to_flat_state(loaded.state)}


def check(name: str, sealed: Path) -> None:
    plain = load_model(NANO / name, make_mesh(), "float32", progress=Silent)
    mesh = make_mesh(stage=STAGES, tensor=2)
    seal(plain, sealed, progress=Silent)
    whole = arrays(plain)
    places = stage_places(plain.config, STAGES)
    for source in (NANO / name, sealed):
        staged = arrays(load_model(source, mesh, "float32", progress=Silent))
        filled = {}
        for path, array in whole.items():
            if path[0] == "layers":
                place, stage = places[path[:2]]
                filled.setdefault((*place, *path[2:]), {})[stage] = np.asarray(array)
            else:
                assert np.array_equal(np.asarray(staged[path]), np.asarray(array)), path
        for path, by_stage in filled.items():
            for stage in range(STAGES):
                found = np.asarray(staged[path][stage])
                assert np.array_equal(found, by_stage.get(stage, np.zeros_like(found))), (source, path, stage)
            assert {shard.index[0] for shard in staged[path].addressable_shards} == {slice(0, 1), slice(1, 2)}
        assert len(filled) + sum(path[0] != "layers" for path in whole) == len(staged)
    print(name)


def check_quantized(name: str, profile: str, sealed: Path) -> None:
    plain = load_model(NANO / name, make_mesh(), "float32", quantization=profile, progress=Silent)
    seal(plain, sealed, profile=profile, rules=rules_of(profile, tied=plain.config.tied_embedding), progress=Silent)
    places = stage_places(plain.config, STAGES)
    staged = arrays(load_model(sealed, make_mesh(stage=STAGES, tensor=2), "float32", progress=Silent))
    quantized = 0
    for path, whole in arrays(plain).items():
        place, stage = places.get(path[:2], (path[:2], None))
        found = staged[(*place, *path[2:])]
        if isinstance(whole, QTensor):
            quantized += 1
            assert (found.format, found.values.dtype, found.scale.dtype) == (whole.format, whole.values.dtype, whole.scale.dtype), path
        found = found if stage is None else found[stage]
        for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
            assert np.array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32)), (profile, path)
    assert quantized >= 7 * len(plain.config.layers)
    print(profile)


jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
for asked in sys.argv[2:]:
    check(asked, Path(sys.argv[1]) / asked)
for form in ("int8", "int4-32", "fp8", "memory_critical"):
    check_quantized("qwen3_moe", form, Path(sys.argv[1]) / form)
