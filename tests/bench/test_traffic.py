import random

import pytest

from bench.traffic import VANISH_PHASES, Lengths, Prompts, make_plan, poisson_times_s, read_trace, scale_lengths

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_a_trace_is_read_in_seconds_from_its_first_request(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    times_s, lengths = read_trace(path)
    assert times_s == pytest.approx([0.0, 4.314579], abs=1e-5)
    assert lengths == [Lengths(374, 44), Lengths(396, 109)]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", HEADER, HEADER + "soon,1,2\n", HEADER + "2023-11-16 18:15:46.68,x,2\n"])
def test_a_file_that_is_no_trace_is_refused(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"trace\.csv"):
        read_trace(path)


def test_scaling_fits_the_longest_by_one_factor_and_never_grows():
    lengths = [Lengths(1000, 1000), Lengths(100, 10), Lengths(1, 1)]
    assert scale_lengths(lengths, 200) == [Lengths(100, 100), Lengths(10, 1), Lengths(1, 1)]
    assert scale_lengths(lengths, 10_000) == lengths
    assert all(item.prompt_tokens + item.output_tokens <= 7 for item in scale_lengths(lengths, 7))


def test_a_plan_is_the_same_for_the_same_seed_and_has_its_shares():
    times_s = poisson_times_s(10.0, 4000, random.Random(3))
    assert times_s == sorted(times_s)
    assert times_s[-1] == pytest.approx(400, rel=0.1)
    plan = make_plan(times_s, [Lengths(5, 5), Lengths(6, 6)], vanish_share=0.2, bad_share=0.05, bad_kinds=7, seed=1)
    assert plan == make_plan(times_s, [Lengths(5, 5), Lengths(6, 6)], vanish_share=0.2, bad_share=0.05, bad_kinds=7, seed=1)
    vanishing = [item for item in plan if item.vanish]
    bad = [item for item in plan if item.bad is not None]
    assert len(vanishing) / 4000 == pytest.approx(0.2, abs=0.03)
    assert len(bad) / 4000 == pytest.approx(0.05, abs=0.02)
    assert {item.vanish for item in vanishing} == set(VANISH_PHASES)
    assert {item.bad for item in bad} == set(range(7))
    assert not [item for item in plan if item.vanish and item.bad is not None]
    assert [item.lengths for item in plan[:3]] == [Lengths(5, 5), Lengths(6, 6), Lengths(5, 5)]


def test_prompts_have_their_length_and_share_only_what_is_asked():
    ids = Prompts(seed=0, vocab=1000, tokens_per_word=1.0, shared_tokens=4)
    first, second = ids.make(0, 10), ids.make(1, 10)
    assert len(first) == len(second) == 10
    assert first[:4] == second[:4]
    assert first[4:] != second[4:]
    assert isinstance(first, list)
    assert min(first) >= 256
    assert max(first) < 1000
    assert ids.make(0, 10) == first
    words = Prompts(seed=0, vocab=None, tokens_per_word=2.0)
    text = words.make(0, 20)
    assert isinstance(text, str)
    assert len(text.split()) == 10
