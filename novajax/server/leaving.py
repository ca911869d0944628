"""Noticing that the client has left: Litestar cancels no plain handler when its client disconnects, so the work races the connection.

Only for requests whose body was read: after that the one thing left to receive is the disconnect.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from novajax.core.errors import NovaError

type Receive = Callable[[], Awaitable[Any]]


class ClientGone(NovaError):
    """The client left; nobody reads this."""

    kind, status = "client_closed_request", 499


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and ClientGone raised, when the client leaves first. No task is left behind."""
    gone = asyncio.create_task(until_gone(receive))
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client left")
        return task.result()
    finally:
        await end(task, gone)


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits until they are over, whatever they raise."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
