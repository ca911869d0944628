"""What the scheduler promises of data partitions. The World checks on the way that rows use the pages of their own partition."""

from typing import Any

import pytest
from scheduler_world import World

from novajax.core.errors import ConfigError, ContextTooLong
from novajax.core.types import Request, SamplingParams
from novajax.kv.manager import KVManager
from novajax.scheduler.admission import Limits
from novajax.scheduler.budget import Shapes
from novajax.scheduler.plan import DecodeRow, Draw, by_partition
from novajax.scheduler.scheduler import Scheduler

SHAPES = Shapes(decode=(1, 2, 4), prefill=((1, 8), (2, 4)), score=(1, 3), step_tokens=16)
PROMPT = tuple(range(3, 13))
OTHER = PROMPT[::-1]
FREE: dict[str, Any] = {"ignore_eos": True}  # runs to max_tokens


def world(**kwargs) -> World:
    return World(**{"shapes": SHAPES, "pages": 64, "slots": 4, "partitions": 2} | kwargs)


def partitions_of(one: World, name: str) -> list[int]:
    """Where a request was prefilled, in order, without repeats."""
    seed, found = 1000 + int(name[1:]), []
    for plan in one.plans:
        for row in plan.prefill:
            if row.draw.seed == seed and found[-1:] != [row.slot // one.slots]:
                found.append(row.slot // one.slots)
    return found


def step(one: World, plans: int) -> None:
    for _ in range(plans):
        one.dispatch()
        one.collect()


def test_rows_are_grouped_by_the_partition_of_their_slot_in_the_order_of_the_plan():
    rows = [DecodeRow(slot, 0, (0,), Draw(), False, 5) for slot in (5, 0, 4, 3, 1)]
    assert [[row.slot for row in group] for group in by_partition(rows, 2, 4)] == [[0, 1], [3], [5, 4], []]
    assert by_partition([], 2, 2) == [[], []]
    assert by_partition(rows, 6) == [rows]


def test_new_sequences_spread_and_a_step_is_as_large_as_the_fullest_partition_needs():
    one = world()
    for _ in range(3):
        one.add(PROMPT[:4], max_tokens=20, salt=str(len(one.answers)), **FREE)
    step(one, 3)
    assert [partitions_of(one, f"r{i}") for i in range(3)] == [[0], [1], [0]]
    assert [[row.slot for row in group] for group in by_partition(one.plans[-1].decode, 4, 2)] == [[0, 1], [4]]
    assert one.plans[-1].decode_rows == 2
    one.run()


def test_prompts_of_several_partitions_share_a_step_and_its_shape():
    one = world(partitions=3)
    for _ in range(3):
        one.add(PROMPT[:8], max_tokens=1, **FREE)
    plan = one.dispatch()
    assert plan is not None
    assert plan.prefill_shape == (1, 8)
    assert [len(group) for group in by_partition(plan.prefill, 4, 3)] == [1, 1, 1]
    one.run()


def test_the_longest_cached_prefix_decides_then_pages():
    one = world()
    one.add(OTHER * 3, max_tokens=4, **FREE)  # to partition 0
    one.add(PROMPT, max_tokens=1, **FREE)
    one.run()
    assert [partitions_of(one, f"r{i}") for i in range(2)] == [[0], [1]]
    one.add((*PROMPT, 5, 6), max_tokens=1, **FREE)
    one.add((*OTHER, 7), max_tokens=1, **FREE)
    one.run()
    assert [partitions_of(one, f"r{i}") for i in (2, 3)] == [[1], [0]]
    finals = [one.answers[f"r{i}"].final for i in (2, 3)]
    assert [final.usage.cached_tokens for final in finals if final and final.usage] == [8, 8]
    one.add((9, 9, 9, 9, 9), max_tokens=30, **FREE)  # unknown, to 0, the first of equals
    step(one, 2)
    one.add((8, 8, 8, 8, 8), max_tokens=1, **FREE)
    one.run()
    assert [partitions_of(one, f"r{i}") for i in (4, 5)] == [[0], [1]]


def test_pages_count_before_slots():
    one = world()
    one.add(PROMPT * 4, max_tokens=20, **FREE)
    for _ in range(3):
        one.add(PROMPT[:4], max_tokens=30, **FREE)
        step(one, 6)
    assert [partitions_of(one, f"r{i}") for i in range(4)] == [[0], [1], [1], [1]]
    one.run()


def test_a_full_partition_leaves_its_cached_prefix_unused():
    one = world(slots=1)
    for _ in range(3):
        one.add(PROMPT * 2, max_tokens=30, **FREE)
        step(one, 6)
    assert partitions_of(one, "r1") == [1]
    assert partitions_of(one, "r2") == []  # no slot anywhere: it waits
    one.run()


def test_nobody_is_preempted_while_another_partition_has_room():
    one = world(slots=1)
    one.add(PROMPT, priority="low", max_tokens=30, **FREE)
    step(one, 4)
    one.add(PROMPT, priority="high", max_tokens=4, **FREE)
    one.run()
    assert partitions_of(one, "r1") == [1]
    assert one.scheduler.stats()["preemptions"] == 0


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_one_place_is_made_for_one_request(in_flight):
    one = world(slots=1, in_flight=in_flight)
    for _ in range(2):
        one.add(PROMPT, priority="low", max_tokens=30, **FREE)
    step(one, 5)
    one.add(PROMPT, priority="high", max_tokens=4, **FREE)
    one.run()
    assert one.scheduler.stats()["preemptions"] == 1


def test_pages_are_taken_only_inside_a_partition():
    one = world(pages=6, slots=2, prefix_cache=False)
    one.add(PROMPT[:8], max_tokens=12, **FREE)
    one.add(OTHER[:8], priority="low", max_tokens=12, **FREE)  # alone in its partition, and the most junior of all
    step(one, 1)
    one.add(PROMPT[:7], max_tokens=12, **FREE)
    one.dispatch()
    while one.dispatch() and not any(partition.leaving for partition in one.scheduler._partitions):
        one.collect()
    assert [partitions_of(one, f"r{i}") for i in range(3)] == [[0], [1], [0]]
    assert [[s.request.id for s in partition.leaving] for partition in one.scheduler._partitions] == [["r2"], []]
    one.run()


def test_a_preempted_sequence_may_come_back_in_another_partition():
    one = world(pages=8, slots=2, prefix_cache=False, in_flight=1)
    one.add(PROMPT[:8], max_tokens=24, **FREE)
    one.add(OTHER[:8], max_tokens=6, **FREE)
    one.add(PROMPT[:7], max_tokens=20, **FREE)
    one.run()
    assert partitions_of(one, "r2") == [0, 1]


def test_a_request_must_fit_one_partition():
    one = world(pages=5)
    with pytest.raises(ContextTooLong, match="KV pool of 20 tokens"):
        one.scheduler.add(Request(id="a", prompt=PROMPT, sampling=SamplingParams(max_tokens=11)), 0.0)


def test_statistics_are_sums_and_a_fault_of_any_partition_is_found():
    one = world(pages=8)
    for _ in range(2):
        one.add(PROMPT, max_tokens=20, salt=str(len(one.answers)), **FREE)
    step(one, 3)
    stats = one.scheduler.stats()
    assert (stats["kv_pages_total"], stats["kv_pages_held"], stats["requests_running"]) == (16, 6, 2)
    one.kvs[1]._pages.alloc(1)
    assert len(one.scheduler.check()) == 1
    assert one.scheduler.stats()["identity_violations"] == 1
    one.scheduler._partitions[1]._free.pop()
    with pytest.raises(ContextTooLong, match="28 tokens"):  # a page less in one partition: who fits only the other might end up here
        one.scheduler.add(Request(id="a", prompt=PROMPT, sampling=SamplingParams(max_tokens=19)), 0.0)
    assert one.scheduler.check() == ["slots [4] are taken and [6, 7] are free, of 4"]


def test_partitions_that_do_not_match_are_refused():
    def build(slots: int, *keys: bytes) -> Scheduler:
        kvs = [KVManager(8, 4, key=key) for key in keys]
        return Scheduler(Limits(vocab_size=40, max_context_tokens=16, max_sequences=slots), SHAPES, kvs)

    assert build(4, b"a", b"a").slots_per_partition == 2
    with pytest.raises(ConfigError, match="5 slots cannot be dealt out to 2"):
        build(5, b"a", b"a")
    with pytest.raises(ConfigError, match="differ"):
        build(4, b"a", b"b")
