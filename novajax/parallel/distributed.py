"""Joins this process to its group's devices: jax.distributed, with bounds on every wait it has.

Call it before anything else asks jax for devices. After it `jax.devices()` are those of all processes, in rank order.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax._src import distributed as internals  # no public name lets a process other than 0 keep what it compiled

HEARTBEAT_S = 10
"""The supervisor is faster; this only ends processes that nobody supervises."""
SHUTDOWN_S = 10


def use_virtual_devices(count: int) -> None:
    """This many CPU devices in this process, whatever the machine has."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def join(*, rank: int, ranks: int, coordinator: str, within_s: float) -> None:
    """Meets the other processes at `coordinator` (host:port, served by rank 0). Raises what jax raises if they do not come in time.

    The preemption service would swallow SIGTERM, which is the supervisor's way to stop a process.
    """
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    local = coordinator.startswith("127.0.0.1:")
    jax.distributed.initialize(
        coordinator,
        num_processes=ranks,
        process_id=rank,
        initialization_timeout=max(1, round(within_s)),
        heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=SHUTDOWN_S,
        coordinator_bind_address=coordinator if local else None,
    )


@contextmanager
def compile_cache_of_its_own(first_on_host: bool) -> Iterator[None]:
    """While entered, this process writes what it compiles to the persistent cache, as only process 0 would.

    A cache may be a host's own, and on CPU its keys name the process: without this every process but one would compile again at
    every restart. Where keys are equal (accelerators) only the first process of a host writes. Devices must be open.
    """
    on_cpu = jax.local_devices()[0].platform == "cpu"
    number = internals.global_state.process_id
    if on_cpu or first_on_host:
        internals.global_state.process_id = 0
    try:
        yield
    finally:
        internals.global_state.process_id = number
