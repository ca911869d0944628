"""Joins this process to its group's devices: jax.distributed, with bounds on every wait it has.

Call it before anything else asks jax for devices. After it `jax.devices()` are those of all processes, in rank order.
"""

import jax

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
