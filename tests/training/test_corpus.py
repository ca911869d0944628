# pyright: reportMissingImports=false
import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "checkpoints" / "recipe"))

from evaluate import PLAN, is_right, prompts
from nova_corpus import arithmetic, jsons, mixture, stories, talk
from nova_corpus.base import HELD_OUT, TRAINING, is_held_out
from nova_corpus.mixture import KINDS


def test_a_document_depends_on_seed_and_index_only() -> None:
    first = [mixture.document(3, i) for i in range(50)]
    assert first == [mixture.document(3, i) for i in range(50)]
    assert first != [mixture.document(4, i) for i in range(50)]
    assert len({str(document) for document in first}) == 50


def test_held_out_operands_never_appear_in_training() -> None:
    rng = random.Random(0)
    for make, sign in ((arithmetic.add, "+"), (arithmetic.subtract, "-")):
        for split in (TRAINING, HELD_OUT):
            for _ in range(300):
                a, b = (int(x) for x in make(rng, split).exchanges[0].assistant.rsplit("So ")[-1].split(" = ")[0].split(f" {sign} "))
                key = f"add {min(a, b)} {max(a, b)}" if sign == "+" else f"subtract {a} {b}"
                assert is_held_out(key) == split.held_out


@pytest.mark.parametrize("split", [TRAINING, HELD_OUT], ids=["training", "held out"])
def test_json_targets_parse_and_their_values_stand_in_the_prompt(split) -> None:
    rng = random.Random(1)
    for _ in range(300):
        exchange = jsons.request(rng, split).exchanges[0]
        value = json.loads(exchange.assistant)
        for leaf in value.values() if isinstance(value, dict) else value:
            if isinstance(leaf, (int, str)) and not isinstance(leaf, bool):
                assert str(leaf) in exchange.user


@pytest.mark.parametrize(
    ("a", "sign", "b", "reply"),
    [
        (47, "+", 38, "47 + 38: 7 + 8 = 15, 4 + 3 + 1 = 8. So 47 + 38 = 85"),
        (81, "-", 47, "81 - 47: 11 - 7 = 4, 8 - 4 - 1 = 3. So 81 - 47 = 34"),
        (5, "+", 98, "5 + 98: 5 + 8 = 13, 0 + 9 + 1 = 10. So 5 + 98 = 103"),
        (3, "+", 4, "3 + 4 = 7"),
    ],
)
def test_shown_work(a, sign, b, reply) -> None:
    assert arithmetic.worked(a, sign, b) == reply


def test_every_shown_column_is_true() -> None:
    for a in range(0, 100, 7):
        for b in range(0, a + 1):
            for sign in "+-":
                for part in arithmetic.worked(a, sign, b).replace("So ", "").replace(". ", ", ").split(": ")[-1].split(", "):
                    left, right = part.split(" = ")
                    terms = left.replace(" - ", " + -").split(" + ")
                    assert sum(map(int, terms)) == int(right), part


def test_a_story_keeps_its_plot() -> None:
    for index in range(100):
        rng = random.Random(index)
        plot = stories.draw_plot(rng, TRAINING)
        text = stories.tell(plot, rng)
        assert text.count(plot.name) >= 3
        assert plot.friend in text
        assert plot.thing in text
        assert "  " not in text


def test_one_question_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for index in range(4000):
        exchange = talk.fact(random.Random(index), TRAINING).exchanges[0]
        assert answers.setdefault(exchange.user, exchange.assistant) == exchange.assistant


def test_reference_replies_pass_their_own_check() -> None:
    for _, generate in KINDS:
        for index in range(30):
            for exchange in generate(random.Random(index), TRAINING).exchanges:
                assert exchange.kind == "story" or is_right(exchange, exchange.assistant), exchange


def test_evaluation_has_200_prompts_and_wrong_replies_fail() -> None:
    items = prompts(1)
    assert len(items) == sum(count for count, _ in PLAN) == 200
    assert len({str(turns) for turns, _ in items}) > 190
    assert not any(is_right(exchange, "I do not know.") for _, exchange in items)
