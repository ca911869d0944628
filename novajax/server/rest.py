"""What the front end does while nobody is inside."""

import asyncio

from novajax.core.heap import REST_S, give_back
from novajax.server.gate import Gate


async def keep_small(gate: Gate, rest_s: float = REST_S) -> None:
    """For ever: the heap's free pages go back to the system once after each time of work, when nobody came for `rest_s`."""
    seen = done = gate.asked
    while True:
        await asyncio.sleep(rest_s)
        if not gate.inside and gate.asked == seen != done:
            give_back()
            done = seen
        seen = gate.asked
