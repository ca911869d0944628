"""What a scheduler promises when there is more work than room. The World checks every page, position and token on the way."""

from typing import Any

import pytest
from scheduler_world import World

from novajax.scheduler.budget import Shapes

SHAPES = Shapes(decode=(1, 2, 4), prefill=((1, 8), (2, 4)), score=(1, 3), step_tokens=16)
FIXED = Shapes(decode=(4,), prefill=((1, 8),), score=(1, 8), step_tokens=12, fixed=True)
PROMPT = tuple(range(3, 13))
FREE: dict[str, Any] = {"ignore_eos": True}  # runs to max_tokens


def world(**kwargs) -> World:
    return World(**{"shapes": SHAPES, "pages": 64, "slots": 4} | kwargs)


def order_of_first_rows(one: World) -> list[int]:
    seen: list[int] = []
    for plan in one.plans:
        seen += [row.draw.seed - 1000 for row in plan.prefill if row.draw.seed - 1000 not in seen]
    return seen


def test_classes_come_in_order_and_first_come_is_first_served_inside():
    one = world(slots=1)
    for priority in ("low", "medium", "high", "low", "high", "medium"):
        one.add(PROMPT, priority=priority, max_tokens=2)
    one.run()
    assert order_of_first_rows(one) == [2, 4, 1, 5, 0, 3]
    assert one.scheduler.stats()["preemptions"] == 0


def test_age_in_plans_lifts_a_low_request_above_a_stream_of_high_ones():
    one = world(slots=1, age_plans=20, max_waiting=100)
    low = str(one.add(PROMPT, priority="low", max_tokens=2))
    for _ in range(40):
        one.add(PROMPT, priority="high", max_tokens=2, **FREE)
    while one.answers[low].final is None:
        one.dispatch()
        one.collect()
    assert 38 <= one.plans[-1].number <= 46  # two classes of 20 plans each
    assert len(one.live()) > 10
    one.run()


def test_age_does_not_throw_out_one_of_the_own_class():
    one = world(slots=1, age_plans=5)
    for _ in range(3):
        one.add(PROMPT, priority="low", max_tokens=30, **FREE)
    one.run()
    assert order_of_first_rows(one) == [0, 1, 2]
    assert one.scheduler.stats()["preemptions"] == 0  # else the older one would come back to the head, and so on for ever


def test_a_high_request_takes_the_slot_of_a_lower_one_but_not_of_its_own_class():
    one = world(slots=2)
    for priority in ("high", "low"):
        one.add(PROMPT, priority=priority, max_tokens=40, **FREE)
    for _ in range(6):
        one.dispatch()
        one.collect()
    urgent = [str(one.add(PROMPT, priority="high", max_tokens=4, **FREE)) for _ in range(2)]
    while one.answers[urgent[1]].final is None:
        one.dispatch()
        one.collect()
    assert one.scheduler.stats()["preemptions"] == 1
    assert set(one.live()) == {"r0", "r1"}
    one.run()
    final = one.answers["r1"].final
    assert final is not None
    assert final.timing is not None
    assert final.timing.preemptions == 1


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_pages_are_taken_from_the_most_junior_who_finishes_later_with_the_same_tokens(in_flight):
    one = world(pages=10, slots=3, in_flight=in_flight, prefix_cache=False)
    for _ in range(3):
        one.add(PROMPT, max_tokens=25, **FREE)
    ends: list[str] = []
    while one.scheduler.has_work:
        one.dispatch()
        one.collect()
        ends += [name for name, answer in one.answers.items() if answer.final and name not in ends]
    one.check()
    assert ends[0] == "r0"
    finals = [answer.final for answer in one.answers.values()]
    preemptions = [final.timing.preemptions for final in finals if final and final.timing]
    assert preemptions[0] == 0
    assert 1 <= sum(preemptions) <= 4  # nobody is thrown out again and again


def test_who_is_preempted_in_flight_is_planned_no_more_and_gives_its_pages_at_the_next_commit():
    one = world(pages=6, slots=2, in_flight=2, prefix_cache=False)
    one.add(PROMPT[:8], priority="high", max_tokens=12, **FREE)
    one.add(PROMPT[:6], priority="low", max_tokens=12, **FREE)  # in the middle of its third page when the other needs a fourth
    one.dispatch()
    while one.dispatch() and not one.scheduler._partitions[0].leaving:
        one.collect()
    assert one.scheduler.stats()["preemptions"] == 0
    stopped = len(one.plans)
    one.collect()
    assert one.scheduler.stats()["preemptions"] == 1
    one.dispatch()
    assert [row.draw.seed for plan in one.plans[stopped:] for row in plan.decode] == [1000]
    one.run()


def test_nobody_is_preempted_for_a_request_that_still_would_not_fit():
    one = world(pages=12, prefix_cache=False)
    one.add(PROMPT * 2, priority="high", max_tokens=8, **FREE)
    one.add(PROMPT[:4], priority="low", max_tokens=12, **FREE)
    one.dispatch()
    one.collect()
    one.add(PROMPT * 2, priority="high", max_tokens=8, **FREE)
    while one.answers["r0"].final is None:
        assert one.scheduler.stats()["preemptions"] == 0
        one.dispatch()
        one.collect()
    one.run()


def test_who_is_preempted_in_the_middle_of_its_prompt_is_planned_no_more():
    one = world(slots=1, in_flight=2)
    one.add(PROMPT * 4, priority="low", max_tokens=4, **FREE)
    one.dispatch()
    one.add(PROMPT, priority="high", max_tokens=4, **FREE)
    assert one.dispatch() is None
    one.collect()
    one.run()
    assert order_of_first_rows(one) == [0, 1]
    assert [start for start, _ in one.answers["r0"].chunks] == [0, 8, 16, 24, 32]  # the first chunk was found again


def test_admission_leaves_a_page_for_each_running_sequence():
    one = world(pages=4, slots=2, in_flight=1)
    one.add(PROMPT[:7], max_tokens=8, **FREE)
    one.dispatch()
    one.collect()
    one.add(PROMPT[:7], max_tokens=8, salt="other", **FREE)  # would fit just now, and be thrown out by the next token but one
    one.run()
    assert one.scheduler.stats()["preemptions"] == 0


def test_a_request_as_large_as_the_pool_is_served_alone():
    one = world(pages=16, slots=4, context=1000)
    for _ in range(3):
        one.add(PROMPT * 2, max_tokens=44, **FREE)
    one.add(PROMPT, max_tokens=5, priority="high")
    one.run()
    assert all(answer.final and answer.final.finish_reason in ("length", "stop") for answer in one.answers.values())


@pytest.mark.parametrize("shapes", [SHAPES, FIXED])
@pytest.mark.parametrize("pages", [8, 9, 12])
def test_alone_or_under_pressure_a_request_draws_the_same_tokens_at_the_same_positions(shapes, pages):
    def lives(prompts, **kwargs) -> tuple:
        one = world(shapes=shapes, slots=4, **kwargs)
        for prompt in prompts:
            one.add(prompt, max_tokens=12, frequency_penalty=0.5, **FREE)
        one.run()
        return list(one.answers.values()), one.scheduler.stats()["preemptions"]

    prompts = [PROMPT[:i] + PROMPT[::-1] for i in range(4)]
    crowd, preemptions = lives(prompts, pages=pages, in_flight=3, prefix_cache=False)
    assert preemptions > 0
    for prompt, answer in zip(prompts, crowd, strict=True):
        assert answer.samples == list(range(len(prompt) - 1, len(prompt) + 11))
    if shapes.fixed:  # every chunk begins at a multiple of C, whatever happened
        assert all(
            start % 8 == 0 and (end % 8 == 0 or end == len(prompt))
            for prompt, a in zip(prompts, crowd, strict=True)
            for start, end in a.chunks
        )


def test_with_fixed_shapes_chunks_and_positions_do_not_depend_on_the_crowd():
    def trace(prompts) -> tuple:
        one = world(shapes=FIXED)
        for prompt in prompts:
            one.add(prompt, max_tokens=6, **FREE)
        one.run()
        assert {(plan.decode_rows, plan.prefill_shape) for plan in one.plans} == {(4, (1, 8))}
        rows = [row for plan in one.plans for row in plan.prefill if row.draw.seed == 1000]
        return [(row.start, row.tokens) for row in rows], one.answers["r0"].samples, one.answers["r0"].got

    alone = trace([PROMPT * 2])
    assert alone == trace([PROMPT * 2, PROMPT, PROMPT[::-1] * 2, PROMPT * 2])


def test_with_fixed_shapes_only_whole_chunks_of_prompts_are_shared():
    one = world(shapes=FIXED)
    one.add(PROMPT, max_tokens=20, **FREE)
    one.run()
    one.add((*PROMPT, *one.answers["r0"].got, 5), max_tokens=2, **FREE)  # its output was computed one by one: other bits
    one.add((*PROMPT, 6, 7, 8), max_tokens=2, **FREE)
    one.run()
    one.add((*PROMPT, 6, 7, 8), max_tokens=2, **FREE)  # 12 tokens are known, of which 8 are a whole chunk
    one.run()
    finals = [answer.final for answer in one.answers.values()]
    assert [final.usage.cached_tokens for final in finals if final and final.usage] == [0, 8, 8, 8]
