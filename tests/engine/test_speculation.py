"""Guesses in the steps of a real engine change how fast an answer comes, and nothing else about it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from served import Answer, Served

from novajax.core.config import EngineConfig
from novajax.core.errors import ConfigError
from novajax.core.types import SamplingParams
from novajax.engine.buckets import make_table
from novajax.engine.build import open_engine
from novajax.engine.inputs import DRAW_COLUMNS, DRAW_FLOATS, DRAW_INTS
from novajax.engine.sampler import NOT_A_NUMBER, WRONG_GUESS, abstract_state, sample
from novajax.scheduler import speculation
from novajax.text.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "checkpoints" / "nova-small"
TEXTS = ["The red fox saw the red fox saw the red", "one two three one two three one two", "Once upon a time there was"]
PLAIN = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=1)
SAMPLINGS = {
    "greedy": PLAIN,
    "drawn": replace(PLAIN, temperature=0.8, top_p=0.9, seed=7),
    "penalized": replace(PLAIN, temperature=0.5, seed=3, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "ending": replace(PLAIN, ignore_eos=False, min_tokens=12, stop_token_ids=tuple(range(10, 40))),
}


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    tokenizer = Tokenizer(MODEL)
    return [tuple(tokenizer.encode(text)) for text in TEXTS]


@pytest.fixture(scope="module")
def served(open_served) -> Served:
    return open_served(model=str(MODEL), max_rows=16, max_context_tokens=128, chunk_tokens=32, page_tokens=8)


def alike(one: Answer, other: Answer) -> None:
    assert one.tokens == other.tokens
    assert (one.last.finish_reason, one.last.stop_token) == (other.last.finish_reason, other.last.stop_token)
    assert [entry.token for entry in one.logprobs] == [entry.token for entry in other.logprobs] == one.tokens
    np.testing.assert_allclose([entry.logprob for entry in one.logprobs], [entry.logprob for entry in other.logprobs], atol=1e-3)


@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_an_answer_is_the_same_with_guesses_alone_and_in_a_crowd(served, prompts, kind, monkeypatch):
    samplings = [SAMPLINGS[kind]] * len(prompts)
    monkeypatch.setattr(speculation, "MARGIN", math.inf)  # they never pay
    expected = served.ask(prompts, samplings)
    before = served.stats()
    assert before.drafted_tokens == 0 or kind != "greedy"
    monkeypatch.setattr(speculation, "MARGIN", 0.0)  # they always pay
    for answer, wanted in zip(served.ask(prompts, samplings), expected, strict=True):
        alike(answer, wanted)
    for prompt, wanted in zip(prompts, expected, strict=True):
        alike(served.ask([prompt], samplings[:1])[0], wanted)
    after = served.stats()
    assert after.drafted_tokens > before.drafted_tokens
    if kind == "greedy":
        assert after.accepted_tokens > before.accepted_tokens
        assert after.steps - before.steps < after.generation_tokens - before.generation_tokens
    assert after.compilations_after_ready == 0


def test_guesses_are_refused_where_a_step_cannot_hold_them():
    for bad in ({"deterministic": True}, {"mesh": {"stage": 2}}):
        with pytest.raises(ConfigError, match="speculation"):
            make_table(_config(speculation="lookup", **bad), 128, on_cpu=True)
        assert make_table(_config(**bad), 128, on_cpu=True).drafts == ()
    assert make_table(_config(max_rows=16), 128, on_cpu=True).drafts == ((1, 7), (4, 3))


def _config(**fields) -> EngineConfig:
    return msgspec.convert({"model": "m", "max_rows": 4} | fields, EngineConfig)


def draws(rows: Sequence[Mapping[str, float]]) -> jax.Array:
    """`inputs.unpack_draws` backwards."""
    made = np.zeros((len(rows), DRAW_COLUMNS), np.int32)
    for i, row in enumerate(rows):
        row = {"top_p": 1.0, "repetition": 1.0, "guess": -1, **row}
        made[i, : len(DRAW_INTS)] = [row.get(name, 0) for name in DRAW_INTS]
        made[i, len(DRAW_INTS) :] = np.array([row.get(name, 0.0) for name in DRAW_FLOATS], np.float32).view(np.int32)
    return jnp.asarray(made)


def test_tokens_count_up_to_the_first_wrong_guess():
    vocab, slots = 8, 3
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract_state(slots, vocab))
    best = [3, 4, 5, 6, 1, 2, 7]
    logits = jax.nn.one_hot(jnp.asarray(best), vocab).at[6, 0].set(jnp.nan)
    rows = [
        {"slot": 1},
        {"slot": 1, "guess": 3},
        {"slot": 1, "guess": 2},  # wrong: the row before drew 4
        {"slot": 1, "guess": 5},  # right, but behind a wrong one
        {"slot": 0},
        {"slot": 0, "guess": 1},
        {"slot": 2},
    ]
    after, tokens = sample(state, logits, draws(rows), variant="full")
    assert tokens.tolist() == [3, 4, WRONG_GUESS, WRONG_GUESS, 1, 2, NOT_A_NUMBER]
    assert after.last_tokens.tolist()[:2] == [2, 4]
    assert {(int(s), int(t)) for s, t in zip(*np.nonzero(after.counts), strict=True)} >= {(1, 3), (1, 4), (0, 1), (0, 2)}
    assert int(after.counts[:2].sum()) == 4


def test_the_drawn_distribution_is_the_model_s_own():
    """Chi-square over 4000 pairs of tokens, the second of which followed a guess: rows draw as if each were alone."""
    vocab, pairs = 6, 4000
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=vocab), rng.normal(size=(vocab, vocab))
    guess = int(first.argmax())
    logits = jnp.asarray(np.stack([first, second[guess]] * pairs), jnp.float32)
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract_state(pairs, vocab))
    rows = [
        {"slot": i, "position": 5 + j, "temperature": 1.0, "seed_low": i, "guess": guess if j else -1} for i in range(pairs) for j in (0, 1)
    ]
    _, tokens = sample(state, logits, draws(rows), variant="draw")
    ones, twos = np.asarray(tokens).reshape(pairs, 2).T
    assert ((twos == WRONG_GUESS) == (ones != guess)).all()
    for seen, weights in ((ones, first), (twos[ones == guess], second[guess])):
        wanted = np.exp(weights) / np.exp(weights).sum() * len(seen)
        found = np.bincount(seen, minlength=vocab)
        assert ((found - wanted) ** 2 / wanted).sum() < 20.5  # five degrees of freedom, one in a thousand


def test_a_draft_model_changes_no_answer_and_guesses_what_it_would_say(open_served, prompts, monkeypatch):
    """Its own draft model guesses every token right, drawn ones too: if its pages and its noise are those of the large one."""
    served = open_served(model=str(MODEL), draft_model=str(MODEL), max_rows=4, max_context_tokens=128, chunk_tokens=32, page_tokens=8)
    for kind, sampling in SAMPLINGS.items():
        samplings = [sampling] * len(prompts)
        monkeypatch.setattr(speculation, "MARGIN", math.inf)
        expected = served.ask(prompts, samplings)
        monkeypatch.setattr(speculation, "MARGIN", 0.0)
        before = served.stats()
        for prompt, wanted in zip(prompts, expected, strict=True):
            alike(served.ask([prompt], [sampling])[0], wanted)  # on the prefix pages of the first time, the draft model's among them
        after = served.stats()
        drafted, accepted = after.drafted_tokens - before.drafted_tokens, after.accepted_tokens - before.accepted_tokens
        assert drafted > 20
        assert accepted == drafted or kind in ("penalized", "ending")
    assert served.stats().prefix_hit_tokens > 0
    assert served.stats().compilations_after_ready == 0


def test_a_draft_model_of_another_vocabulary_is_refused(shared):
    with pytest.raises(ConfigError, match="tokens"):
        open_engine(_config(model=str(MODEL), draft_model=str(shared / "models" / "stories260k")))
    with pytest.raises(ConfigError, match="draft_model"):
        make_table(_config(speculation="draft"), 128, on_cpu=True)
    with pytest.raises(ConfigError, match="lookup"):
        make_table(_config(speculation="lookup", draft_model="m"), 128, on_cpu=True)
