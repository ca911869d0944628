"""Run by test_quantizing.py in a process of its own: a quantized model's bits are the same on 8 devices as on one."""

import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from novajax.parallel.mesh import make_mesh
from novajax.quant.qtensor import QTensor
from novajax.telemetry.progress import Silent
from novajax.weights.load import load_model


def arrays(state: nnx.State) -> dict[str, np.ndarray]:
    """By path; of a QTensor both."""
    found = {}
    for path, variable in nnx.to_flat_state(state):
        held, name = variable.get_value(), ".".join(map(str, path))
        parts = {"values": held.values, "scale": held.scale} if isinstance(held, QTensor) else {"": held}
        found |= {f"{name}.{part}": np.asarray(array, np.float32) for part, array in parts.items()}
    return found


def main(directory: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    one = make_mesh(devices=jax.devices()[:1])
    for name in ("int8", "int4-32", "memory_critical"):
        wanted = arrays(load_model(directory, one, "float32", quantization=name, progress=Silent).state)
        state = load_model(directory, make_mesh(data=2, tensor=2, query=2), "float32", quantization=name, progress=Silent).state
        got = arrays(state)
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(got[key], value, err_msg=key)
        layers = {path[-1]: variable.get_value() for path, variable in nnx.to_flat_state(state) if path[0] == "layers"}
        assert {shard.data.size for shard in layers["gate"].values.addressable_shards} == {layers["gate"].size // 4}
        assert {shard.data.size for shard in layers["gate"].scale.addressable_shards} == {layers["gate"].scale.size // 4}
        print(name)


main(Path(sys.argv[1]))
