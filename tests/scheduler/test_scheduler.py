"""What a scheduler promises, one promise a test. The World checks every page, position and token on the way."""

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from scheduler_world import END, VOCAB, World

from novajax.core.errors import CapacityError, Conflict, ContextTooLong, InternalError, InvalidRequest, Overloaded, Unsupported
from novajax.core.types import Request, SamplingParams
from novajax.scheduler.budget import Shapes
from novajax.scheduler.plan import ON_DEVICE, StepPlan

SHAPES = Shapes(decode=(1, 2, 4), prefill=((1, 8), (2, 4)), score=(1, 3), step_tokens=16)
PROMPT = tuple(range(3, 13))
FREE: dict[str, Any] = {"ignore_eos": True}  # runs to max_tokens


def world(**kwargs) -> World:
    return World(**{"shapes": SHAPES, "pages": 64, "slots": 4} | kwargs)


def request(name="a", prompt=PROMPT, **sampling) -> Request:
    return Request(id=name, prompt=prompt, sampling=SamplingParams(**sampling))


# --- admission


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (request(prompt=()), InvalidRequest, "empty"),
        (request(prompt=(3, -1)), InvalidRequest, "-1 in prompt is not in 0..39"),
        (request(prompt=(3, VOCAB)), InvalidRequest, "40 in prompt"),
        (request(prompt=(2**31,)), InvalidRequest, "2147483648"),
        (request(stop_token_ids=(VOCAB,)), InvalidRequest, "stop_token_ids"),
        (request(logit_bias={-1: 1.0}), InvalidRequest, "logit_bias"),
        (request(logit_bias={VOCAB: 1.0}), InvalidRequest, "logit_bias"),
        (request(max_tokens=55), ContextTooLong, "10 prompt tokens .* 55 max_tokens = 65 exceed the model's context of 64"),
        (request(prompt=PROMPT * 7), ContextTooLong, "70 prompt tokens .* 64"),
        (request(prompt=PROMPT * 7, max_tokens=0), ContextTooLong, "70 prompt tokens .* 64"),
        (request(max_tokens=2, min_tokens=3), InvalidRequest, "min_tokens=3 exceeds the 2"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_the_numbers(bad, error, words):
    one = world()
    with pytest.raises(error, match=words):
        one.scheduler.add(bad, 0.0)
    assert not one.scheduler.has_work


def test_the_pool_bounds_a_request_as_the_context_does():
    one = world(pages=5)
    with pytest.raises(ContextTooLong, match="exceed this engine's KV pool of 20 tokens"):
        one.scheduler.add(request(max_tokens=11), 0.0)
    assert one.add(PROMPT, max_tokens=10, **FREE)
    one.run()


def test_prompts_cannot_be_scored_without_a_shape_for_it():
    one = world(shapes=Shapes(decode=(4,), prefill=((1, 8),), step_tokens=16))
    with pytest.raises(Unsupported, match="prompt_logprobs"):
        one.scheduler.add(request(prompt_logprobs=0), 0.0)


def test_ids_are_unique_while_they_live():
    one = world()
    one.scheduler.add(request(), 0.0)
    with pytest.raises(Conflict):
        one.scheduler.add(request(), 0.0)
    one.scheduler.abort("a", 0.0)
    one.scheduler.add(request(), 0.0)


def test_the_queue_is_bounded_in_requests_and_tokens():
    one = world(slots=2, max_waiting=3)
    for i in range(5):  # two for the free slots
        one.scheduler.add(request(str(i)), 0.0)
    with pytest.raises(Overloaded, match="5 requests are waiting, the limit is 3") as caught:
        one.scheduler.add(request("x"), 0.0, retry_after_s=7.0)
    assert caught.value.retry_after_s == 7.0
    two = world(max_waiting_tokens=25)
    two.scheduler.add(request("0", PROMPT * 3), 0.0)  # larger than the bound, but nothing else waits
    two.scheduler.plan(0.0)
    two.scheduler.add(request("1"), 0.0)
    two.scheduler.add(request("2"), 0.0)
    with pytest.raises(Overloaded, match="30 prompt tokens would be waiting, the limit is 25"):
        two.scheduler.add(request("3"), 0.0)


def test_all_slots_must_fit_the_decode_block():
    with pytest.raises(CapacityError, match="5 sequences do not fit 4"):
        world(slots=5)


# --- plans


def test_a_prompt_is_cut_into_chunks_and_decoding_runs_ahead():
    one = world(slots=1)
    one.add(PROMPT, max_tokens=3, **FREE)
    first, second = one.dispatch(), one.dispatch()
    assert first is not None
    assert second is not None
    assert one.dispatch() is None  # two plans are in flight
    assert [(row.start, len(row.tokens), row.last, row.following) for row in (*first.prefill, *second.prefill)] == [
        (0, 8, False, PROMPT[8]),
        (8, 2, True, -1),
    ]
    one.collect()
    third = one.dispatch()
    assert third is not None
    assert third.prefill_shape is None
    assert [(row.position, row.input, row.last) for row in third.decode] == [(10, ON_DEVICE, True)]
    one.collect()
    one.collect()
    fourth = one.dispatch()
    assert fourth is not None
    assert [(row.position, row.input) for row in fourth.decode] == [(11, one.answers["r0"].tokens[1])]
    assert one.dispatch() is None  # the third token is the last
    one.run()


def test_decode_goes_on_beside_prefill_and_short_prompts_share_a_step():
    one = world(in_flight=1)
    one.add(PROMPT[:3], max_tokens=20, **FREE)
    one.dispatch()
    one.collect()
    one.add(PROMPT[:4], max_tokens=20, **FREE)
    one.add(PROMPT[:3], max_tokens=20, **FREE)
    plan = one.dispatch()
    assert plan is not None
    assert (len(plan.decode), len(plan.prefill), plan.prefill_shape) == (1, 2, (2, 4))
    one.run()


def test_a_page_table_is_the_same_object_until_it_grows():
    one = world(slots=1, in_flight=1)
    one.add(PROMPT[:4], max_tokens=9, **FREE)
    one.run()
    tables = [row.pages for plan in one.plans for row in plan.decode]
    assert [len(table) for table in tables] == [2, 2, 2, 2, 3, 3, 3, 3]
    assert all(a is b for a, b in pairwise(tables) if len(a) == len(b))


def test_plans_travel_and_their_digest_sees_every_change():
    one = world()
    one.add(PROMPT, max_tokens=3, logit_bias={5: 1.0, 3: 2.0}, prompt_logprobs=1, **FREE)
    one.run()
    digests = set()
    for plan in one.plans:
        again = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        assert again == plan
        assert again.digest() == plan.digest()
        digests |= {plan.digest(), msgspec.structs.replace(plan, number=plan.number + 1).digest()}
        for row in plan.decode:
            digests.add(msgspec.structs.replace(plan, decode=(msgspec.structs.replace(row, ban_ends=True),)).digest())
    assert len(digests) == 2 * len(one.plans) + sum(len(plan.decode) for plan in one.plans)


def test_commits_come_in_order():
    one = world()
    one.add(PROMPT, max_tokens=3)
    one.dispatch()
    one.dispatch()
    for number in (1, 7):
        with pytest.raises(InternalError, match=f"plan {number} is not the oldest"):
            one.scheduler.commit(number, {}, {}, 0.0)


def test_a_slot_is_cleared_for_the_next_sequence_if_the_last_one_left_state():
    one = world(slots=1)
    for sampling in ({"logit_bias": {5: 9.0}, "min_tokens": 1}, {}, {}, {"min_tokens": 2, "ignore_eos": True}):
        one.add(PROMPT, max_tokens=2, **sampling)
    one.run()
    assert [(seat.logit_bias, seat.ends) for plan in one.plans for seat in plan.seats] == [({5: 9.0}, END), ({}, ())]


# --- ends


def test_the_stop_token_ends_a_request_and_is_not_among_its_tokens():
    one = world()
    name = one.add(PROMPT, max_tokens=50, stop_token_ids=tuple(range(0, VOCAB, 4)), min_tokens=3, **FREE)
    one.run()
    final = one.answers[str(name)].final
    assert final is not None
    assert final.finish_reason == "stop"
    assert final.stop_token is not None
    assert final.stop_token % 4 == 0
    assert len(one.answers[str(name)].got) >= 3
    assert sum(len(plan.seats) for plan in one.plans) == 1


def test_max_tokens_zero_scores_the_prompt_and_samples_nothing():
    one = world()
    name = one.add(PROMPT, max_tokens=0, prompt_logprobs=0)
    one.run()
    answer = one.answers[str(name)]
    assert answer.final is not None
    assert (answer.final.finish_reason, answer.samples) == ("length", [])
    assert answer.prompt_logprobs is not None
    assert [(row.start, len(row.tokens), row.score) for plan in one.plans for row in plan.prefill] == [
        (0, 3, True),
        (3, 3, True),
        (6, 3, True),
        (9, 1, True),
    ]


def test_scoring_takes_turns_with_other_prompts():
    one = world()
    one.add(PROMPT, max_tokens=0, prompt_logprobs=0)
    one.add(PROMPT * 2, max_tokens=1)
    one.run()
    assert [plan.prefill[0].score for plan in one.plans if plan.prefill] == [True, False, True, False, True, False, True]


def test_a_scored_prompt_is_not_taken_from_the_cache_but_serves_others():
    one = world()
    for prompt_logprobs in (None, 0, None):
        one.add(PROMPT, max_tokens=1, prompt_logprobs=prompt_logprobs)
        one.run()
    finals = [answer.final for answer in one.answers.values()]
    assert [final.usage.cached_tokens for final in finals if final and final.usage] == [0, 0, 8]


def test_an_abort_ends_at_once_and_its_pages_come_back_when_nothing_in_flight_names_them():
    one = world()
    name = str(one.add(PROMPT, max_tokens=30, **FREE))
    one.dispatch()
    one.dispatch()
    one.abort(name)
    assert one.kv.held == 3
    assert one.scheduler.request_ids() == []
    one.collect()
    assert one.kv.held == 3
    one.collect()
    assert one.kv.held == 0
    one.abort(name)
    assert one.scheduler.abort("never seen", 0.0) is None
    one.run()


def test_aborts_are_counted_by_how_far_the_sequence_was():
    one = world()
    queued = str(one.add(PROMPT, max_tokens=30, **FREE))
    one.abort(queued)
    begun = str(one.add(PROMPT, max_tokens=30, **FREE))
    one.dispatch()
    one.abort(begun)
    one.run()
    going = str(one.add(PROMPT, max_tokens=30, **FREE))
    for _ in range(6):
        one.dispatch()
        one.collect()
    one.abort(going)
    one.run()
    stats = one.scheduler.stats()
    assert [stats[f"aborted_{phase}"] for phase in ("queued", "prefill", "decode")] == [1, 1, 1]


def test_a_failed_request_leaves_nothing_in_the_prefix_cache():
    one = world()
    name = str(one.add(PROMPT, max_tokens=30, **FREE))
    for _ in range(4):
        one.dispatch()
        one.collect()
    one.fail(name)
    one.run()
    assert one.kv.cached == 0
    final = one.answers[name].final
    assert final is not None
    assert final.finish_reason == "error"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda results: results.clear(),
        lambda results: results.update({k: msgspec.structs.replace(v, tokens=(VOCAB,)) for k, v in results.items()}),
        lambda results: results.update({k: msgspec.structs.replace(v, tokens=v.tokens * 2) for k, v in results.items()}),
    ],
)
def test_a_result_that_is_missing_or_impossible_fails_its_request_alone(break_it):
    one = world(in_flight=1)
    bad = str(one.add(PROMPT[:4], max_tokens=30, **FREE))
    one.dispatch()
    break_it(one.uncommitted[0][1])
    good = str(one.add(PROMPT, max_tokens=5, **FREE))
    one.run()
    finals = [one.answers[name].final for name in (bad, good)]
    assert [final.finish_reason for final in finals if final] == ["error", "length"]


def test_missing_scores_fail_the_request():
    one = world(in_flight=1)
    name = str(one.add(PROMPT, max_tokens=3, prompt_logprobs=0))
    one.dispatch()
    one.uncommitted[0][2].clear()
    one.run()
    final = one.answers[name].final
    assert final is not None
    assert final.finish_reason == "error"


def test_a_seed_is_drawn_when_none_is_given_and_reported():
    one = world()
    one.scheduler.add(request("a", max_tokens=0), 5.0)
    one.scheduler.add(request("b", max_tokens=0), 5.0)
    plan = one.scheduler.plan(6.0)
    assert plan is not None
    updates = [one.scheduler.abort(name, 9.0) for name in "ab"]
    seeds = {update.seed for update in updates if update}
    assert len(seeds) == 2
    assert all(seed is not None and 0 <= seed < 2**53 for seed in seeds)


def test_usage_and_times():
    one = world(slots=1, in_flight=1)
    for _ in range(2):
        one.add(PROMPT, max_tokens=3, **FREE)
    one.run()
    first, second = (answer.final for answer in one.answers.values())
    assert first is not None
    assert second is not None
    assert first.usage is not None
    assert second.usage is not None
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 8)
    assert first.timing is not None
    assert second.timing is not None
    assert (first.timing.queued_s, first.timing.prefill_s, first.timing.decode_s) == (1, 5, 6)
    assert second.timing.queued_s == 13
    stats = one.scheduler.stats()
    assert (stats["prompt_tokens"], stats["generation_tokens"], stats["steps"]) == (20, 6, 7)
    assert (stats["prefix_query_tokens"], stats["prefix_hit_tokens"]) == (20, 8)


# --- faults of our own


def test_a_lost_page_shrinks_the_pool_and_who_no_longer_fits_is_told():
    one = world(pages=6, slots=2, in_flight=1)
    one.add(PROMPT, max_tokens=14, **FREE)  # cannot grow to its end
    one.add((*PROMPT, *PROMPT, 5), max_tokens=3, **FREE)  # cannot even begin
    one.add(PROMPT * 2, max_tokens=1, **FREE)
    one.dispatch()
    one.collect()
    one.kv._pages.alloc(1)  # somebody takes a page and forgets it
    assert len(one.scheduler.check()) == 1
    assert one.scheduler.stats()["identity_violations"] == 1
    one.run()
    finals = [answer.final for answer in one.answers.values()]
    assert [final.finish_reason for final in finals if final] == ["error", "error", "length"]
    assert {final.failure.kind for final in finals if final and final.failure} == {"capacity_error"}
    assert one.kv.quarantined == 1


def test_a_lost_slot_is_reported():
    one = world()
    one.scheduler._partitions[0]._free.pop()
    assert one.scheduler.check() == ["slots [] are taken and [1, 2, 3] are free, of 4"]
