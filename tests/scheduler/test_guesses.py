"""Guesses from a sequence's own tokens, and the decision to make any."""

from array import array

import pytest
from scheduler_world import World

from novajax.scheduler.budget import Shapes
from novajax.scheduler.lookup import NGRAM, Lookup
from novajax.scheduler.record import Record
from novajax.scheduler.speculation import PLAIN_RUN

SHAPES = Shapes(decode=(1, 4), prefill=((1, 8),), step_tokens=16, drafts=((1, 7), (4, 3)))


def test_a_guess_is_what_followed_the_newest_earlier_occurrence():
    lookup = Lookup()
    assert lookup.guess([1, 2, 3], 4) == ()
    assert lookup.guess([1, 2, 3, 9, 1, 2, 3, 8, 7, 5, 1, 2, 3], 3) == (8, 7, 5)
    assert lookup.guess([1, 2, 3, 9, 1, 2, 3, 8, 7, 5, 1, 2, 3, 4], 3) == ()


def test_a_guess_goes_round_where_the_text_does():
    assert Lookup().guess([0, 5, 6, 7, 5, 6, 7], 5) == (5, 6, 7, 5, 6)
    assert Lookup().guess([4] * (NGRAM + 1), 3) == (4, 4, 4)


def test_an_occurrence_between_two_tokens_is_none():
    """Tokens lie as bytes: 0x01000000 twice reads like 1 one byte further."""
    tokens = [0x01000000] * (NGRAM + 1) + [9] + [1] * NGRAM
    shifted = array("i", [1] * NGRAM).tobytes()
    assert shifted[:-1] in array("i", tokens[: NGRAM + 1]).tobytes()
    assert Lookup().guess(tokens, 2) == ()


def test_a_record_expects_less_of_longer_guesses_and_forgets():
    new, good, bad = Record(), Record(), Record()
    for _ in range(30):
        good.landed(7, 7)
        bad.landed(7, 0)
    assert new.expected(1) == 0.5
    assert new.expected(7) < 1.0
    assert good.expected(7) > 5.0
    assert bad.expected(7) < 0.15
    for _ in range(1000):
        bad.fade()
    assert bad.expected(7) == pytest.approx(new.expected(7), abs=0.01)


@pytest.mark.parametrize(("cost", "pays"), [(1.5, True), (9.0, False)])
def test_guesses_stop_where_their_steps_cost_too_much(cost, pays):
    world = World(shapes=SHAPES, slots=1, pages=200, page_tokens=4, context=400)
    world.add(range(3, 11), max_tokens=300, ignore_eos=True)
    guessed = []
    while world.scheduler.has_work:
        while (plan := world.dispatch()) is not None:
            guessed.append(any(row.drafts for row in plan.decode))
            world.now_s += cost if guessed[-1] else 0.0
        world.now_s += 1.0
        world.collect()
    assert not any(guessed[: PLAIN_RUN + 1])  # plain steps are timed first
    assert (sum(guessed) > 0.9 * (len(guessed) - PLAIN_RUN - 2)) == pays
    assert any(guessed)
    if not pays:
        assert sum(guessed) < 0.05 * len(guessed)
