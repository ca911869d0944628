"""Drawing tokens on the device: penalties and bias, temperature, filters, and a draw that depends on (seed, position) only.

Three variants of one program, chosen by the host for a whole step: `greedy` (an argmax), `draw` (temperature and
filters) and `full` (also the per-slot state: counts, bias, bans). A row's token never depends on who shares the batch.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from novajax.core.types import MAX_STOP_TOKEN_IDS, MAX_TOP_LOGPROBS
from novajax.engine.inputs import unpack_draws

Variant = Literal["greedy", "draw", "full"]
VARIANTS: tuple[Variant, ...] = ("greedy", "draw", "full")
END_IDS = MAX_STOP_TOKEN_IDS + 16
"""End and stop ids a slot can ban: the request's own and the model's."""
NOT_A_NUMBER = -1
"""The token of a row whose logits hold NaN: the host fails that request alone."""
WRONG_GUESS = -2
"""The token of a row behind a guess that proved wrong: it counts for nothing."""
GREEDY_BELOW = 1e-5
"""Temperatures up to this are greedy: dividing by less would leave float32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """Per-slot state that outlives a step. Donated to each draw."""

    last_tokens: jax.Array  # i32[slots]
    counts: jax.Array  # i32[slots, V], occurrences in the output
    seen: jax.Array  # bool[slots, V], occurs in the prompt
    bias: jax.Array  # f32[slots, V]
    ends: jax.Array  # i32[slots, END_IDS], V: unused


def abstract_state(slots: int, vocab: int) -> SamplingState:
    shape: Any = jax.ShapeDtypeStruct
    return SamplingState(
        shape((slots,), jnp.int32),
        shape((slots, vocab), jnp.int32),
        shape((slots, vocab), jnp.bool_),
        shape((slots, vocab), jnp.float32),
        shape((slots, END_IDS), jnp.int32),
    )


def seat(
    state: SamplingState, slot: jax.Array, counts_V: jax.Array, seen_V: jax.Array, bias_V: jax.Array, ends: jax.Array
) -> SamplingState:
    """The state with one slot's rows replaced: a sequence that needs them sits down. Donates: state."""
    return SamplingState(
        state.last_tokens,
        state.counts.at[slot].set(counts_V),
        state.seen.at[slot].set(seen_V),
        state.bias.at[slot].set(bias_V),
        state.ends.at[slot].set(ends),
    )


def sample(state: SamplingState, logits_XV: jax.Array, draws: jax.Array, *, variant: Variant) -> tuple[SamplingState, jax.Array]:
    """(state with the drawn tokens in it, tokens i32[X]). Donates: state. Rows whose slot is past the end draw into nothing.

    Rows with guesses follow the row whose token they guess. Each draws with the noise of its own position, as it would have if its guess
    had been known: so a sequence gets the very tokens that it gets without guesses. For a guess that is certain this accepts as often as
    rejection sampling (arXiv 2211.17192); a draft model that draws with the same noise agrees almost as often (arXiv 2408.07978).
    """
    d = unpack_draws(draws)
    sound_X = ~jnp.isnan(jnp.max(logits_XV, axis=-1))
    if variant == "full":
        logits_XV = shape_logits(state, logits_XV, d)
    tokens_X = _best(logits_XV) if variant == "greedy" else draw(logits_XV, d)
    right_X = _right(jnp.where(sound_X, tokens_X, NOT_A_NUMBER), d["guess"])
    nowhere = state.last_tokens.shape[0]
    slot = jnp.where(right_X, d["slot"], nowhere)
    counts = state.counts
    if variant == "full":
        counts = counts.at[slot, tokens_X].add(1, mode="drop")
    newest = jnp.append(slot[1:], nowhere) != slot  # a slot's right guesses are neighbours
    last_tokens = state.last_tokens.at[jnp.where(newest, slot, nowhere)].set(tokens_X, mode="drop")
    state = SamplingState(last_tokens, counts, state.seen, state.bias, state.ends)
    return state, jnp.where(right_X, jnp.where(sound_X, tokens_X, NOT_A_NUMBER), WRONG_GUESS)


def _right(tokens_X: jax.Array, guess_X: jax.Array) -> jax.Array:
    """bool[X]: rows without a guess, and those behind them as long as each guess is what the row before drew."""
    at_X = jnp.arange(len(tokens_X))
    wrong_X = (guess_X >= 0) & (jnp.roll(tokens_X, 1) != guess_X)
    return lax.cummax(jnp.where(wrong_X, at_X, -1)) < lax.cummax(jnp.where(guess_X < 0, at_X, -1))


def _guessed(guess_X: jax.Array) -> jax.Array:
    """bool[X, X]: whether the guess of row i is one of the tokens before the draw of row x."""
    at_X = jnp.arange(len(guess_X))
    first_X = lax.cummax(jnp.where(guess_X < 0, at_X, -1))
    return (at_X > first_X[:, None]) & (at_X <= at_X[:, None])


def shape_logits(state: SamplingState, logits_XV: jax.Array, d: dict[str, jax.Array]) -> jax.Array:
    """Penalties, then bias, then bans. Repetition counts prompt and output; presence and frequency the output only."""
    slot = d["slot"]
    counts_XV = state.counts.at[slot].get(mode="clip")
    rows, vocab = logits_XV.shape
    counts_XV = counts_XV.at[jnp.arange(rows)[:, None], jnp.where(_guessed(d["guess"]), d["guess"], vocab)].add(1, mode="drop")
    seen_XV = state.seen.at[slot].get(mode="clip") | (counts_XV > 0)
    factor = d["repetition"][:, None]
    punished = jnp.where(logits_XV > 0, logits_XV / factor, logits_XV * factor)
    logits_XV = jnp.where(seen_XV, punished, logits_XV)
    logits_XV -= d["frequency"][:, None] * counts_XV + d["presence"][:, None] * (counts_XV > 0)
    logits_XV += state.bias.at[slot].get(mode="clip")
    ends_XE = jnp.where(d["ban_ends"][:, None] > 0, state.ends.at[slot].get(mode="clip"), vocab)
    return logits_XV.at[jnp.arange(rows)[:, None], ends_XE].set(-jnp.inf, mode="drop")


def draw(logits_XV: jax.Array, d: dict[str, jax.Array]) -> jax.Array:
    """i32[X]: one token of each row, by its temperature and filters; `d` is from `unpack_draws`."""
    best_X, warm_X = _best(logits_XV), d["temperature"] > GREEDY_BELOW
    return lax.cond(jnp.any(warm_X), lambda: jnp.where(warm_X, _draw(logits_XV, d), best_X), lambda: best_X)


def _draw(logits_XV: jax.Array, d: dict[str, jax.Array]) -> jax.Array:
    """Gumbel-max over the filtered distribution, the noise keyed by fold_in(seed, position)."""
    temperature = jnp.where(d["temperature"] > GREEDY_BELOW, d["temperature"], 1.0)[:, None]
    # With the best logit at zero no temperature can overflow, and the best weight is exp(0) = 1.
    scaled_XV = (logits_XV - jnp.max(logits_XV, axis=-1, keepdims=True)) / temperature
    kept_XV = filters(scaled_XV, d["top_k"], d["top_p"], d["min_p"])
    seeds = jnp.stack([d["seed_high"], d["seed_low"]], axis=-1)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(lax.bitcast_convert_type(seeds, jnp.uint32)), d["position"])
    noise_XV = jax.vmap(lambda key: jax.random.gumbel(key, logits_XV.shape[1:], jnp.float32))(keys)
    return _best(jnp.where(kept_XV, scaled_XV + noise_XV, -jnp.inf))


def _best(scores_XV: jax.Array) -> jax.Array:
    """i32[X]: the first of the highest scores, as argmax has it; the last token for a row with NaN. Two plain reductions: on a CPU the
    one over pairs that argmax is takes ten times as long."""
    last = scores_XV.shape[1] - 1
    places = lax.broadcasted_iota(jnp.int32, scores_XV.shape, 1)
    return jnp.min(jnp.where(scores_XV == jnp.max(scores_XV, axis=-1, keepdims=True), places, last), axis=-1)


def filters(scaled_XV: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """bool[X, V]: tokens that survive top_k (0: all), then top_p of what is left, then min_p. Ties at an edge all survive.

    No sort: the edge is found bit by bit in the order-preserving integer form of the floats, 32 reductions over V.
    """
    order_XV = _ordered(scaled_XV)
    vocab = scaled_XV.shape[-1]

    def edge(enough) -> jax.Array:
        """The largest threshold t, u32[X, 1], for which enough(order >= t)."""

        def bit(i: jax.Array, t: jax.Array) -> jax.Array:
            trial = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
            return jnp.where(enough(order_XV >= trial), trial, t)

        return lax.fori_loop(0, 32, bit, jnp.zeros((scaled_XV.shape[0], 1), jnp.uint32))

    def everything() -> jax.Array:
        return jnp.ones(scaled_XV.shape, jnp.bool_)

    limit = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)[:, None]

    def best_k() -> jax.Array:
        return order_XV >= edge(lambda there: jnp.sum(there, axis=-1, keepdims=True) >= limit)

    kept = lax.cond(jnp.any(top_k > 0), best_k, everything)
    weights = jnp.where(kept, jnp.exp(scaled_XV), 0.0)
    goal = top_p[:, None] * jnp.sum(weights, axis=-1, keepdims=True)

    def nucleus() -> jax.Array:
        t = edge(lambda there: jnp.sum(jnp.where(there, weights, 0.0), axis=-1, keepdims=True) >= goal)
        return kept & ((order_XV >= t) | (top_p[:, None] >= 1.0))

    kept = lax.cond(jnp.any(top_p < 1.0), nucleus, lambda: kept)
    return kept & (weights >= min_p[:, None])


def _ordered(x: jax.Array) -> jax.Array:
    """u32 that compares like the float32 it came from."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def score(logits_XV: jax.Array, tokens_X: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of given tokens under the unmodified distribution: (log probability f32[X], rank i32[X] from 1, top ids i32[X, 20],
    top log probabilities f32[X, 20])."""
    logprobs_XV = jax.nn.log_softmax(logits_XV, axis=-1)
    tokens = jnp.clip(tokens_X, 0, logits_XV.shape[1] - 1)
    chosen = jnp.take_along_axis(logprobs_XV, tokens[:, None], axis=1)
    rank = 1 + jnp.sum(logprobs_XV > chosen, axis=-1)
    values, ids = lax.top_k(logprobs_XV, min(MAX_TOP_LOGPROBS, logits_XV.shape[1]))
    return chosen[:, 0], rank, ids, values
