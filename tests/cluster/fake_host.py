"""A host that is not the head, with fake ranks: COORDINATOR SECRET INDEX COUNT RANKS STALL_S."""

import asyncio
import sys

from novajax.cluster.rank import die_with_parent
from novajax.cluster.remotehost import attend
from novajax.cluster.settings import ClusterSettings, Order, Place
from novajax.core.config import EngineConfig
from novajax.telemetry.logging import configure


def main(coordinator: str, secret: str, index: str, count: str, ranks: str, stall_s: str) -> int:
    configure()
    die_with_parent()
    order = Order(
        config=EngineConfig(model="fake"),
        settings=ClusterSettings(processes=int(ranks), stall_s=float(stall_s), gather_s=30, start_stall_s=30),
        place=Place(index=int(index), count=int(count), coordinator=coordinator),
        secret=secret.encode(),
        directory="",
        command=("-m", "tests.cluster.fake_worker"),
    )
    return asyncio.run(attend(order))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
