"""Drawing on the device against plain numpy, and the promise that a row's token is its own business."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from novajax.engine import inputs, sampler
from novajax.engine.buckets import Bucket
from novajax.scheduler.plan import DecodeRow, Draw, StepPlan

VOCAB, SLOTS = 50, 4
sample = jax.jit(sampler.sample, static_argnames="variant")


def draws_of(rows: list[DecodeRow]) -> jax.Array:
    bucket = Bucket(len(rows), 0, 0, 1)
    plan = StepPlan(0, tuple(rows), (), (), len(rows), None)
    return inputs.unpack(jnp.asarray(inputs.pack(plan, bucket, 1, SLOTS)[0]), bucket)["draws"]


def row(slot: int = 0, position: int = 3, *, ban_ends: bool = False, **draw) -> DecodeRow:
    return DecodeRow(slot, position, (0,), Draw(**draw), ban_ends, 1)


def state(**parts) -> sampler.SamplingState:
    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sampler.abstract_state(SLOTS, VOCAB))
    fields = {name: getattr(empty, name) for name in ("last_tokens", "counts", "seen", "bias", "ends")}
    fields["ends"] = jnp.full_like(empty.ends, VOCAB)
    return sampler.SamplingState(**(fields | parts))


def logits(rows: int, seed: int = 0, scale: float = 3.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), (rows, VOCAB))


def kept_by_sorting(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The textbook: sort, cut at k, cut the cumulated probability at p, drop what is far below the best."""
    order = np.argsort(-scaled)[: top_k or None]
    weights = np.exp(scaled[order] - scaled.max())
    before = np.cumsum(weights) - weights
    order = order[before < top_p * weights.sum()]
    return {int(i) for i in order if np.exp(scaled[i] - scaled.max()) >= min_p}


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (9, 0.6, 0.0), (0, 0.95, 0.1), (1, 1.0, 0.0)]
)
def test_filters_equal_the_sorted_definition(top_k: int, top_p: float, min_p: float):
    scaled = logits(8)
    many = [jnp.full(8, value) for value in (top_k, top_p, min_p)]
    kept = np.asarray(jax.jit(sampler.filters)(scaled - scaled.max(axis=1, keepdims=True), *many))
    for x in range(8):
        assert set(np.flatnonzero(kept[x])) == kept_by_sorting(np.asarray(scaled[x], np.float64), top_k, top_p, min_p)


def test_each_row_has_its_own_filters():
    scaled = logits(3) - logits(3).max(axis=1, keepdims=True)
    kept = sampler.filters(scaled, jnp.array([0, 2, 7]), jnp.ones(3), jnp.zeros(3))
    assert kept.sum(axis=1).tolist() == [VOCAB, 2, 7]


def test_ties_at_the_edge_all_survive():
    scaled = jnp.array([[0.0, -1.0, -1.0, -2.0]])
    assert sampler.filters(scaled, jnp.array([2]), jnp.ones(1), jnp.zeros(1)).tolist() == [[True, True, True, False]]


def test_the_draw_depends_on_seed_and_position_only():
    same = logits(1, seed=3)
    alone = draws_of([row(seed=11, temperature=1.0)])
    crowd = draws_of([row(1, 9, seed=5, temperature=0.5), row(0, 3, seed=11, temperature=1.0), row(2, 3, temperature=0.0)])
    _, one = sample(state(), same, alone, variant="draw")
    _, three = sample(state(), jnp.concatenate([logits(1, 8), same, logits(1, 9)]), crowd, variant="draw")
    assert int(one[0]) == int(three[1])
    full = sample(state(), same, alone, variant="full")[1]
    assert int(full[0]) == int(one[0])
    flat = jnp.zeros((1, VOCAB))
    drawn = {int(sample(state(), flat, draws_of([row(0, p, seed=11)]), variant="draw")[1][0]) for p in range(40)}
    assert len(drawn) > 15


def test_draws_follow_the_distribution():
    """Chi-square over 4,000 positions against the softmax of six tokens; 99.99 % bound for 5 degrees of freedom."""
    few = jnp.array([1.0, 0.5, 0.0, -0.5, 0.2, -2.0] + [-1e9] * (VOCAB - 6))
    rows = [row(0, position, seed=1234567890123, temperature=0.8) for position in range(4000)]
    _, tokens = sample(state(), jnp.broadcast_to(few, (4000, VOCAB)), draws_of(rows), variant="draw")
    seen = np.bincount(np.asarray(tokens), minlength=VOCAB)[:6]
    expected = 4000 * np.asarray(jax.nn.softmax(few / 0.8))[:6]
    assert ((seen - expected) ** 2 / expected).sum() < 25.7


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-6])
def test_tiny_temperatures_are_greedy(temperature: float):
    x = logits(1)
    _, tokens = sample(state(), x, draws_of([row(temperature=temperature)]), variant="draw")
    assert int(tokens[0]) == int(jnp.argmax(x))


def test_penalties_bias_and_bans():
    x = jnp.zeros((1, VOCAB)).at[0, :6].set(jnp.array([5.0, 4.0, 3.0, 2.0, 1.0, -1.0]))
    counts = jnp.zeros((SLOTS, VOCAB), jnp.int32).at[2, 0].set(3)
    seen = jnp.zeros((SLOTS, VOCAB), jnp.bool_).at[2, 1].set(True).at[2, 5].set(True)
    bias = jnp.zeros((SLOTS, VOCAB)).at[2, 3].set(10.0)
    ends = jnp.full((SLOTS, sampler.END_IDS), VOCAB, jnp.int32).at[2, 0].set(2)
    penalized = row(2, ban_ends=True, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    d = inputs.unpack_draws(draws_of([penalized]))
    out = np.asarray(sampler.shape_logits(state(counts=counts, seen=seen, bias=bias, ends=ends), x, d))[0]
    assert out[:6].tolist() == [5 / 2 - 0.5 - 3 * 0.25, 4 / 2, -np.inf, 12.0, 1.0, -2.0]


def test_counts_grow_only_for_seated_rows():
    rows = draws_of([row(1), row(3)])
    after, tokens = sample(state(), logits(2), rows, variant="full")
    assert after.counts.sum() == 2
    assert int(after.counts[1, tokens[0]]) == 1
    assert after.last_tokens.tolist()[1::2] == tokens.tolist()


def test_a_row_of_nan_is_told_apart():
    x = logits(2).at[0, 7].set(jnp.nan)
    for variant in sampler.VARIANTS:
        _, tokens = sample(state(), x, draws_of([row(0), row(1)]), variant=variant)
        assert int(tokens[0]) == sampler.NOT_A_NUMBER
        assert 0 <= int(tokens[1]) < VOCAB


def test_scores_are_of_the_plain_distribution():
    x = logits(3)
    chosen, rank, ids, values = sampler.score(x, jnp.array([4, 0, 49]))
    plain = np.asarray(jax.nn.log_softmax(x))
    for i, token in enumerate([4, 0, 49]):
        assert float(chosen[i]) == pytest.approx(plain[i, token], abs=1e-6)
        assert int(rank[i]) == 1 + (plain[i] > plain[i, token]).sum()
        assert np.asarray(ids[i]).tolist() == np.argsort(-plain[i])[:20].tolist()
        assert np.all(np.diff(np.asarray(values[i])) <= 0)
