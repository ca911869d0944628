"""Every choice is the best there is, checked against trying all of them, and never exceeds what it was given."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from novajax.calibration import knapsack
from novajax.calibration.knapsack import Knapsack, Option
from novajax.core.errors import CapacityError

OPTIONS = st.builds(Option, st.just(""), st.integers(0, 40), st.integers(0, 50).map(float))
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=5)


def every(items):
    return [(sum(one.bytes for one in taken), sum(one.loss for one in taken)) for taken in itertools.product(*items)]


@settings(max_examples=60, deadline=None)
@given(items=ITEMS, budget=st.integers(0, 200), loss=st.integers(0, 250))
def test_as_good_as_trying_all(items, budget, loss):
    solved, all_ = Knapsack(items), every(items)
    fitting = [lost for size, lost in all_ if size <= budget]
    if fitting:
        choice = solved.within(budget)
        assert (choice.bytes, choice.loss) in all_
        assert choice.bytes <= budget
        assert choice.loss == min(fitting)
    else:
        with pytest.raises(CapacityError, match="too few"):
            solved.within(budget)
    small = [size for size, lost in all_ if lost <= loss]
    if small:
        choice = solved.at_most(loss)
        assert choice.loss <= loss
        assert choice.bytes == min(small)
    else:
        with pytest.raises(CapacityError, match="out of reach"):
            solved.at_most(loss)


def test_a_coarse_grid_stays_within_the_budget(monkeypatch):
    monkeypatch.setattr(knapsack, "GRID", 64)
    items = [[Option("", 0, 10.0), Option("", 997 + number, 3.0), Option("", 2003, 0.0)] for number in range(8)]
    choice = Knapsack(items).within(9_000)
    assert choice.bytes <= 9_000
    assert choice.loss <= min(lost for size, lost in every(items) if size <= 8_000)
