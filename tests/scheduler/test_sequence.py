import pytest

from novajax.core.errors import InternalError
from novajax.core.types import Request, SamplingParams
from novajax.kv.prefix import Chain
from novajax.scheduler.sequence import Sequence, State


def sequence(**sampling) -> Sequence:
    request = Request(id="a", prompt=(5, 6, 7), sampling=SamplingParams(**sampling))
    return Sequence(request, number=0, seed=9, max_tokens=4, end_token_ids=(2,), chain=Chain(b""), arrival_s=10.0)


def test_only_the_moves_of_the_machine_are_possible():
    one = sequence()
    with pytest.raises(InternalError, match="waiting to decode"):
        one.move(State.DECODE)
    for state in (State.PREFILL, State.PREEMPTED, State.PREFILL, State.DECODE, State.PREEMPTED, State.ABORTED):
        one.move(state)
    for state in State:
        with pytest.raises(InternalError):
            one.move(state)


def test_end_tokens_stop_after_min_tokens_and_max_tokens_is_the_length():
    one = sequence(stop_token_ids=(8,), min_tokens=1)
    assert one.stop_reason(2) is None
    one.tokens.append(2)
    assert (one.stop_reason(2), one.stop_reason(8), one.stop_reason(3)) == ("stop", "stop", None)
    one.tokens += [3, 3]
    assert (one.stop_reason(8), one.stop_reason(3)) == ("stop", "length")
    assert sequence(ignore_eos=True).stop_reason(2) is None


def test_a_seat_is_needed_only_for_state_on_the_device():
    assert not sequence(temperature=0.5, top_k=4, stop_token_ids=(8,)).draw.seated
    assert not sequence(min_tokens=2, ignore_eos=True).draw.seated  # nothing to ban
    for sampling in (
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 2.0}},
        {"min_tokens": 1},
    ):
        assert sequence(**sampling).draw.seated


def test_times_are_spans_between_given_moments():
    one = sequence()
    assert one.timing(12.0).queued_s == 2
    assert one.timing(12.0).prefill_s is None
    one.admitted_s, one.first_token_s = 11.0, 15.0
    timing = one.timing(18.0)
    assert (timing.queued_s, timing.prefill_s, timing.decode_s) == (1, 4, 3)
