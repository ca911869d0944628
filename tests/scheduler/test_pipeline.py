"""What the scheduler promises a device with pipeline stages. The World checks the lag of every token on the way."""

import random
from itertools import pairwise
from typing import Any

import pytest
from scheduler_world import World

from novajax.core.errors import CapacityError, ConfigError, InternalError
from novajax.scheduler.budget import Shapes
from novajax.scheduler.pipeline import share
from novajax.scheduler.plan import ON_DEVICE

SHAPES = Shapes(decode=(1, 2, 4, 8), prefill=((1, 8), (2, 4)), score=(1, 3), step_tokens=24)
FIXED = Shapes(decode=(4,), prefill=((1, 8),), score=(1, 8), step_tokens=12, fixed=True)
PROMPT = tuple(range(3, 13))
FREE: dict[str, Any] = {"ignore_eos": True}  # runs to max_tokens


def world(**kwargs) -> World:
    return World(**{"shapes": SHAPES, "pages": 64, "slots": 4} | kwargs)


def numbers_by_request(one: World, since: int = 0) -> dict[int, list[int]]:
    """The plans in which each request decoded."""
    found: dict[int, list[int]] = {}
    for plan in one.plans[since:]:
        for row in plan.decode:
            found.setdefault(row.draw.seed - 1000, []).append(plan.number)
    return found


def step(one: World, plans: int) -> None:
    """As the engine's loop does it, until so many more plans were dispatched."""
    until = len(one.plans) + plans
    while len(one.plans) < until:
        if one.dispatch() is None:
            assert one.collect()


# --- the spread


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_no_tick_is_empty_and_each_sequence_decodes_every_p_ticks(stages, in_flight):
    for sequences in range(stages, 2 * stages + 2):
        one = world(slots=sequences, stages=stages, in_flight=in_flight, pages=200, context=100)
        for _ in range(sequences):
            one.add(PROMPT[:4], max_tokens=80, **FREE)
        step(one, 4 * sequences + 2 * stages)  # all prompts are computed, and the load has found its balance
        settled = len(one.plans)
        step(one, 5 * stages)
        window = one.plans[settled:]
        assert all(plan.decode and not plan.prefill for plan in window)
        sizes = {len(plan.decode) for plan in window}
        assert sizes <= {sequences // stages, -(-sequences // stages)}
        times = numbers_by_request(one, settled)
        assert len(times) == sequences
        assert all(b - a == stages for numbers in times.values() for a, b in pairwise(numbers))


@pytest.mark.parametrize(
    ("waits_ticks", "stages", "now"),
    [
        ([], 3, 0),
        ([1, 2], 3, 0),
        ([0] * 5, 1, 5),
        ([0, 0, 0, 0], 2, 2),
        ([0, 0, 0, 1], 2, 2),
        ([0, 0, 2, 1], 3, 2),
        ([0, 0, 2, 2], 3, 1),  # the next tick would be empty
        ([0, 2, 2], 3, 1),  # one tick of the two stays empty: rather the later one
        ([0, 0], 4, 1),
    ],
)
def test_a_plan_takes_an_even_share_of_the_decoding_sequences(waits_ticks, stages, now):
    assert share(waits_ticks, stages) == now


def test_the_load_finds_its_balance_again_after_any_change():
    rng = random.Random(3)
    for _ in range(500):
        stages, count = rng.randint(1, 6), rng.randint(1, 14)
        ready_at = [rng.randrange(stages) for _ in range(count)]
        taken = []
        for tick in range(6 * stages):
            waits = [max(0, at - tick) for at in ready_at]
            now = share(waits, stages)
            order = sorted((i for i, wait in enumerate(waits) if wait == 0), key=ready_at.__getitem__)
            for i in order[:now]:
                ready_at[i] = tick + stages
            taken.append(now)
        assert set(taken[2 * stages :]) <= {count // stages, -(-count // stages)}
        assert all(sum(taken[i : i + stages]) == count for i in range(2 * stages, 5 * stages))


def test_fewer_sequences_than_stages_decode_one_a_tick_with_bubbles_between():
    one = world(slots=2, stages=4, in_flight=2)
    for _ in range(2):
        one.add(PROMPT[:4], max_tokens=6, **FREE)
    one.run()
    times = numbers_by_request(one)
    assert all(b - a == 4 for numbers in times.values() for a, b in pairwise(numbers))
    assert max(len(plan.decode) for plan in one.plans) == 1
    assert sum(plan.bubble for plan in one.plans) > 5


def test_sequences_that_share_the_stages_may_outnumber_the_decode_rows():
    one = world(slots=24, stages=3, pages=200)
    for _ in range(24):
        one.add(PROMPT[:2], max_tokens=20, **FREE)
    one.run()
    assert max(len(plan.decode) for plan in one.plans) == 8
    with pytest.raises(CapacityError, match="9 sequences do not fit 8"):
        world(slots=25, stages=3)


# --- the lag


def test_a_bubble_pushes_a_result_out_and_comes_only_while_none_can_be_collected():
    one = world(stages=3, in_flight=1)
    one.add(PROMPT[:4], max_tokens=2, **FREE)
    plans = [one.dispatch() for _ in range(4)]
    assert [None if plan is None else (plan.number, plan.bubble) for plan in plans] == [(0, False), (1, True), (2, True), None]
    assert one.scheduler.in_flight == 1
    assert {(plan.decode_rows, plan.prefill_shape) for plan in plans[1:3] if plan} == {(1, None)}
    one.collect()
    plan = one.dispatch()
    assert plan is not None
    assert [(row.position, row.input) for row in plan.decode] == [(4, one.answers["r0"].tokens[0])]
    one.run()
    assert [plan.number for plan in one.plans] == list(range(6))  # the last result is out: no bubble follows


def test_chunks_of_a_prompt_follow_each_other_and_the_first_decode_row_waits_for_the_draw():
    one = world(stages=3, in_flight=2)
    one.add(PROMPT * 2, max_tokens=3, **FREE)
    step(one, 6)
    assert [[(row.start, len(row.tokens)) for row in plan.prefill] for plan in one.plans] == [[(0, 8)], [(8, 8)], [(16, 4)], [], [], []]
    assert [[(row.position, row.input) for row in plan.decode] for plan in one.plans[3:]] == [[], [], [(20, ON_DEVICE)]]
    one.run()


def test_known_output_is_replayed_without_the_lag():
    one = world(shapes=FIXED, slots=1, stages=4, in_flight=2)
    one.add(PROMPT[:8], priority="low", max_tokens=12, **FREE)
    while len(one.answers["r0"].got) < 5:
        step(one, 1)
    one.add(PROMPT[:4], priority="high", max_tokens=1, **FREE)
    one.run()
    replayed = [plan.number for plan in one.plans for row in plan.decode if row.draw.seed == 1000 and not row.last]
    assert len(replayed) >= 4
    assert replayed == list(range(replayed[0], replayed[0] + len(replayed)))


def test_a_bubble_of_fixed_shapes_has_the_one_shape_there_is():
    one = world(shapes=FIXED, slots=2, stages=2)
    one.add(PROMPT, max_tokens=4, **FREE)
    one.run()
    assert any(plan.bubble for plan in one.plans)
    assert {(plan.decode_rows, plan.prefill_shape) for plan in one.plans} == {(4, (1, 8))}


def test_results_cannot_be_committed_before_they_exist():
    one = world(stages=2)
    one.add(PROMPT[:4], max_tokens=2, **FREE)
    one.dispatch()
    with pytest.raises(InternalError, match="still inside"):
        one.scheduler.commit(0, {}, {}, 0.0)


def test_a_pipeline_that_could_not_be_filled_is_refused():
    with pytest.raises(ConfigError, match="in_flight=3 plans cannot fill a pipeline of 4 stages"):
        world(stages=4, in_flight=0)


@pytest.mark.parametrize("shapes", [SHAPES, FIXED])
@pytest.mark.parametrize(("partitions", "stages"), [(1, 2), (1, 4), (2, 1), (3, 3)])
def test_a_crowd_under_pressure_draws_what_each_request_draws_alone(shapes, partitions, stages):
    one = world(shapes=shapes, pages=9, slots=4, partitions=partitions, stages=stages, prefix_cache=False)
    for i in range(4 * partitions):
        one.add(PROMPT[: i % 4] + PROMPT[::-1], max_tokens=12, frequency_penalty=0.5, **FREE)
    one.run()
    assert one.scheduler.stats()["preemptions"] > 0
    assert all(answer.got == answer.tokens for answer in one.answers.values())
