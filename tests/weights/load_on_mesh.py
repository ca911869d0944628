"""Run by test_import.py in a process of its own: loads families onto 8 virtual devices and compares with the plain form."""

import sys

import jax
import numpy as np
from flax import nnx
from weight_files import NANO, assert_same, expected_state, state_arrays

from novajax.parallel.mesh import make_mesh
from novajax.telemetry.progress import Silent
from novajax.weights.load import load_model
from novajax.weights.safetensors import SafetensorsDirectory, Tensor

plain_fill = SafetensorsDirectory._fill


def main(names: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = make_mesh(data=2, tensor=2, query=2)
    for name in names:
        read_bytes: dict[str, int] = {}

        def fill(self: SafetensorsDirectory, tensor: Tensor, buffer: memoryview, offset: int, read_bytes=read_bytes) -> None:
            read_bytes[tensor.name] = read_bytes.get(tensor.name, 0) + buffer.nbytes
            plain_fill(self, tensor, buffer, offset)

        SafetensorsDirectory._fill = fill
        loaded = load_model(NANO / name, mesh, "float32", progress=Silent)
        wanted = {key: value.astype(np.float32) for key, value in expected_state(NANO / name).items()}
        assert_same(state_arrays(loaded.state), wanted)
        shards = {".".join(map(str, path)): variable.get_value().addressable_shards for path, variable in nnx.to_flat_state(loaded.state)}
        gate = next(key for key in shards if key.endswith("mlp.gate"))
        assert {shard.data.size for shard in shards[gate]} == {wanted[gate].size // 4}, "four parts, each on two devices"
        with SafetensorsDirectory(NANO / name) as directory:
            for tensor in directory.tensors.values():
                stored_bytes, cut_in_columns = (
                    tensor.stop - tensor.start,
                    tensor.name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")),
                )
                got_bytes = read_bytes.get(tensor.name, 0)
                assert got_bytes <= stored_bytes * (4 if cut_in_columns else 1), (tensor.name, got_bytes, stored_bytes)
        print(name)


main(sys.argv[1:])
