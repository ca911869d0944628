"""The arithmetic of the quality bench."""

import math

import numpy as np

from bench.quality import Scores, compare


def test_a_known_loss_is_found_with_its_interval():
    rng = np.random.default_rng(1)
    logprobs = -rng.uniform(0.5, 3, (40, 30))
    best = rng.integers(0, 9, (40, 30))
    noise = rng.normal(0, 0.1, (40, 30))
    other = best.copy()
    other[:, :3] += 1
    loss = compare("v", Scores(logprobs, best), Scores(logprobs - 0.02 + noise, other))
    assert loss.change_low < math.expm1(0.02) < loss.change_high
    assert loss.change_high - loss.change_low < 0.03
    assert loss.agreement == 0.9
    assert math.isclose(compare("same", Scores(logprobs, best), Scores(logprobs, best)).change, 0)
