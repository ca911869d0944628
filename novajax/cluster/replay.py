"""A Backend whose requests outlive the engine behind it: what was lost in flight is asked again and goes on in the same stream.

Invariants
- Exactly once by index: an update's tokens below what was delivered are dropped, a gap ends the request with an error.
- The same tokens: every request has a seed from its first submission, and the tokens delivered go along as `resumed`, so that
  positions, penalties and limits are those of the first try.
- Bounded: how often one request is tried again, how long it waits, and how many wait. At a bound it gets one EngineFailed.
A request that the engine refuses, or that fails alone, is never repeated.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from novajax.cluster.settings import ClusterSettings
from novajax.core.backend import Backend
from novajax.core.errors import EngineFailed, InternalError, Overloaded, Unavailable
from novajax.core.types import ModelCard, Request, Stats, Update, Usage

SEED_BITS = 53
"""Seeds survive JSON readers that use doubles."""
_AGAIN_S = 0.1


class Returning(Backend, Protocol):
    """A backend that may be lost and come back."""

    @property
    def given_up(self) -> bool:
        """It will not come back."""
        ...

    @property
    def was_ready(self) -> bool: ...

    async def until_ready(self) -> None:
        """Returns when requests are welcome, or when it was given up."""
        ...


class ReplayingBackend:
    """See the module docstring. Owns `inner`; used on one event loop."""

    def __init__(self, inner: Returning, settings: ClusterSettings):
        self._inner = inner
        self._settings = settings
        self._live = 0
        self._waiting = 0
        self._aborted: dict[str, asyncio.Event] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self.replays = 0

    async def card(self) -> ModelCard:
        return await self._inner.card()

    async def submit(self, request: Request) -> AsyncIterator[Update]:
        if self._draining:
            raise Unavailable("the engine is draining", retry_after_s=5)
        if request.sampling.seed is None:
            request = msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, seed=secrets.randbits(SEED_BITS)))
        if request.id in self._aborted:
            raise InternalError(f"request id {request.id} is already running")
        self._aborted[request.id] = asyncio.Event()
        self._live += 1
        self._idle.clear()
        try:
            async for update in self._resume(request):
                yield update
        finally:
            del self._aborted[request.id]
            self._live -= 1
            if not self._live:
                self._idle.set()

    async def _resume(self, request: Request) -> AsyncIterator[Update]:
        """One stream out of as many tries as it takes."""
        delivered: list[int] = []
        tries = 0
        while True:
            asked = resumed(request, tuple(delivered))
            stream = self._inner.submit(asked)
            try:
                async for update in stream:
                    fresh = after(update, len(delivered))
                    if fresh is None:
                        continue
                    delivered += fresh.tokens
                    if fresh.usage is not None:
                        fresh = msgspec.structs.replace(fresh, usage=_honest(fresh.usage, len(request.prompt)))
                    yield fresh
                    if fresh.finish_reason is not None:
                        return
                cause = EngineFailed("its answer broke off")
            except (EngineFailed, Unavailable) as error:
                if isinstance(error, Unavailable) and (not self._inner.was_ready or self._inner.given_up):
                    raise
                cause = error
            except Overloaded:
                if not tries:
                    raise
                await asyncio.sleep(_AGAIN_S)  # it was inside before; those that came since have its place for a moment
                continue
            finally:
                await stream.aclose()  # type: ignore[attr-defined]
            tries += 1
            if tries > self._settings.max_replays:
                raise EngineFailed(f"the engine was lost {tries} times under this request: {cause.message}", retry_after_s=5)
            if not await self._wait(request.id, cause):
                yield _cut_off(request, len(delivered))
                return
            self.replays += 1

    async def _wait(self, request_id: str, cause: EngineFailed | Unavailable) -> bool:
        """Until the engine is back; False if the request was aborted meanwhile. Raises EngineFailed at a bound."""
        if self._waiting >= self._settings.max_waiting_replays:
            raise EngineFailed(f"{self._waiting} requests wait for the engine already: {cause.message}", retry_after_s=5)
        self._waiting += 1
        back = asyncio.create_task(self._inner.until_ready())
        gone = asyncio.create_task(self._aborted[request_id].wait())
        try:
            await asyncio.wait({back, gone}, timeout=self._settings.replay_wait_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                return False
            if not back.done():
                wait_s = self._settings.replay_wait_s
                raise EngineFailed(f"the engine did not come back within {wait_s:g} s: {cause.message}", retry_after_s=30)
            if self._inner.given_up:
                raise EngineFailed(cause.message, retry_after_s=30)
            return True
        finally:
            self._waiting -= 1
            back.cancel()
            gone.cancel()
            await asyncio.gather(back, gone, return_exceptions=True)

    async def abort(self, request_id: str) -> None:
        if (aborted := self._aborted.get(request_id)) is not None:
            aborted.set()
        await self._inner.abort(request_id)

    async def stats(self) -> Stats:
        stats = await self._inner.stats()
        if self._draining and stats.phase == "ready":
            stats = msgspec.structs.replace(stats, phase="draining")
        return msgspec.structs.replace(stats, requests_waiting=stats.requests_waiting + self._waiting)

    async def drain(self, grace_s: float) -> None:
        """The engine behind is told last: until then it may be lost, come back, and take replays."""
        self._draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            for request_id in list(self._aborted):
                await self.abort(request_id)
        await self._inner.drain(0)

    async def close(self) -> None:
        for aborted in self._aborted.values():
            aborted.set()
        await self._inner.close()


def resumed(request: Request, delivered: tuple[int, ...]) -> Request:
    """What to ask for so that the answer goes on behind the tokens that were delivered. Prompt scores came with the first of them."""
    if not delivered:
        return request
    sampling = msgspec.structs.replace(request.sampling, prompt_logprobs=None)
    return msgspec.structs.replace(request, resumed=delivered, sampling=sampling)


def after(update: Update, delivered: int) -> Update | None:
    """The part of an update that is new; None if nothing is. Raises InternalError if tokens are missing in between."""
    if not update.tokens:
        return update
    skip = delivered - update.start
    if skip < 0:
        raise InternalError(f"tokens {delivered} to {update.start - 1} of this answer were lost")
    if not skip:
        return update
    fresh = msgspec.structs.replace(update, start=update.start + skip, tokens=update.tokens[skip:], logprobs=update.logprobs[skip:])
    return fresh if fresh.tokens or fresh.finish_reason is not None else None


def _honest(usage: Usage, prompt_tokens: int) -> Usage:
    return msgspec.structs.replace(usage, cached_tokens=min(usage.cached_tokens, prompt_tokens))


def _cut_off(request: Request, delivered: int) -> Update:
    usage = Usage(len(request.prompt), delivered)
    return Update(request_id=request.id, start=delivered, finish_reason="abort", usage=usage, seed=request.sampling.seed)
