# pyright: reportMissingImports=false
import json
import sys
from pathlib import Path

import msgspec
import pytest

from novajax.models.families.registry import read_config
from novajax.training.recipe import read_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "checkpoints" / "recipe"))

from evaluate import PLAN, prompts
from generate import load
from nova_corpus import arithmetic, jsons

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
SMALL = CHECKPOINTS / "nova-small"


@pytest.mark.parametrize("name", ["nova-small", "nova-draft"])
def test_a_bundled_checkpoint_is_whole_and_made_by_the_kept_recipe(name) -> None:
    directory = CHECKPOINTS / name
    training = json.loads((directory / "training.json").read_text())
    recipe = read_recipe(CHECKPOINTS / "recipe" / f"{name}.yaml")
    assert training["recipe"] == msgspec.json.decode(msgspec.json.encode(recipe))
    assert json.loads((directory / "config.json").read_text()) == recipe.model
    assert read_config(recipe.model).kv_heads == 2
    assert training["curve"][-1]["step"] == recipe.steps
    assert min(point["loss"] for point in training["curve"]) < training["curve"][0]["loss"] / 10
    for file in (
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    ):
        assert (directory / file).stat().st_size > 0


def test_all_checkpoints_are_small_and_share_a_tokenizer() -> None:
    kept = [path for path in CHECKPOINTS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in kept) < 15_000_000
    assert (SMALL / "tokenizer.json").read_bytes() == (CHECKPOINTS / "nova-draft" / "tokenizer.json").read_bytes()


def test_the_kept_evaluation_keeps_the_promises() -> None:
    report = json.loads((SMALL / "evaluation.json").read_text())
    for way in ("greedy", "sampled"):
        assert report[way]["prompts"] == sum(count for count, _ in PLAN) == 200
        assert report[way]["arithmetic_right"] >= 0.9
        assert report[way]["json_valid"] >= 0.95


def test_the_model_answers_unseen_prompts_now() -> None:
    items = prompts(7, ((6, arithmetic.add), (6, arithmetic.subtract), (6, jsons.request)))
    replies = load(SMALL).chat([turns for turns, _ in items], 64)
    right = [
        reply.endswith(f"= {exchange.answer}") if exchange.kind in ("add", "subtract") else reply == exchange.answer
        for (_, exchange), reply in zip(items, replies, strict=True)
    ]
    assert sum(right) >= 16, list(zip(replies, right, strict=True))
