"""Small partitioned programs on eight virtual devices; prints what `read_collectives` finds in each, as JSON. A process of its own."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import msgspec  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

from novajax.planner.hlo import read_collectives  # noqa: E402

P = PartitionSpec


def main() -> None:
    mesh = jax.make_mesh((2, 4), ("stage", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def put(shape, *axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    def mlp(x, up, down):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ up) @ down, NamedSharding(mesh, P()))

    def loop(x, up, down):
        return jax.lax.fori_loop(0, 5, lambda _, x: mlp(x, up, down), x)

    def manual(x):
        def body(y):
            passed = jax.lax.ppermute(y, "tensor", [(0, 1), (1, 2), (2, 3)])
            gathered = jax.lax.all_gather(y, "stage")
            scattered = jax.lax.psum_scatter(jnp.tile(y, (4, 1)), "tensor", tiled=True)
            return passed + gathered.sum(0) + scattered

        spec = P(("stage", "tensor"))
        return jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    weights = (put((256, 512), None, "tensor"), put((512, 256), "tensor", None))
    half = (put((256, 512), None, ("stage", "tensor"), dtype=jnp.bfloat16), put((512, 256), ("stage", "tensor"), None, dtype=jnp.bfloat16))
    programs = {
        "mlp": (mlp, (put((8, 256)), *weights)),
        "loop": (loop, (put((8, 256)), *weights)),
        "bfloat16": (mlp, (put((8, 256), dtype=jnp.bfloat16), *half)),
        "manual": (manual, (put((32, 256), ("stage", "tensor")),)),
    }
    found = {
        name: [[*msgspec.structs.astuple(one), times] for one, times in sorted(read_collectives(compiled(*program)).items())]
        for name, program in programs.items()
    }
    print(msgspec.json.encode(found).decode())


def compiled(function, arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text() or ""


if __name__ == "__main__":
    main()
