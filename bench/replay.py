"""Plays a plan of requests against a target, open loop (by the clock) or closed loop (by free clients).

The open loop never slows down for a slow server: a request beyond `max_open` is recorded as unsent, not delayed. Samples
come back in the order of the plan.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

from bench.client import Sample, Target
from bench.traffic import Planned, Prompts


async def replay_open(
    target: Target, plan: Sequence[Planned], prompts: Prompts, *, max_open: int, on_sample: Callable[[Sample], None] = lambda _: None
) -> list[Sample]:
    """Each request leaves at its planned second, whatever became of the others."""
    started_s = time.perf_counter()
    samples: list[Sample] = []
    open_requests = 0

    async def send(planned: Planned, late_s: float) -> None:
        nonlocal open_requests
        try:
            sample = await target.send(planned, prompts.make(planned.index, planned.lengths.prompt_tokens), started_s)
        finally:
            open_requests -= 1
        sample.late_s = late_s
        samples.append(sample)
        on_sample(sample)

    async with asyncio.TaskGroup() as group:
        for planned in plan:
            wait_s = planned.at_s - (time.perf_counter() - started_s)
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            now_s = time.perf_counter() - started_s
            if open_requests >= max_open:
                samples.append(_unsent(planned, now_s))
                continue
            open_requests += 1
            group.create_task(send(planned, max(0.0, now_s - planned.at_s)))
    return sorted(samples, key=lambda sample: sample.index)


async def replay_closed(
    target: Target,
    plan: Iterable[Planned],
    prompts: Prompts,
    *,
    concurrency: int,
    duration_s: float | None = None,
    on_sample: Callable[[Sample], None] = lambda _: None,
) -> list[Sample]:
    """`concurrency` clients, each sending its next request when the last is over, until the plan or the time is used up."""
    started_s = time.perf_counter()
    samples: list[Sample] = []
    rest = iter(plan)

    async def client() -> None:
        for planned in rest:
            if duration_s is not None and time.perf_counter() - started_s > duration_s:
                return
            sample = await target.send(planned, prompts.make(planned.index, planned.lengths.prompt_tokens), started_s)
            samples.append(sample)
            on_sample(sample)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return sorted(samples, key=lambda sample: sample.index)


def _unsent(planned: Planned, now_s: float) -> Sample:
    return Sample(
        index=planned.index,
        sent_at_s=now_s,
        outcome="unsent",
        planned_bad=planned.bad is not None,
        planned_vanish=planned.vanish is not None,
    )
