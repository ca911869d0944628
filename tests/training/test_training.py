# pyright: reportMissingImports=false
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from novajax.core.errors import ConfigError
from novajax.models.attention import dense_causal
from novajax.models.decoder import Decoder, init_model
from novajax.models.families.registry import read_config
from novajax.training.data import batches
from novajax.training.export import foreign_tensors, save_checkpoint
from novajax.training.loop import Trainer
from novajax.training.loss import packed_causal, weighted_loss
from novajax.training.optimizer import matrix_axes, rate, scale_embedding
from novajax.training.recipe import OptimizerRecipe, Recipe, Stage, TokenizerRecipe, read_recipe
from novajax.training.tokens import first_texts, save_tokenizer, train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "checkpoints" / "recipe"))

from generate import load
from nova_corpus import mixture

RECIPES = Path(__file__).parents[2] / "checkpoints" / "recipe"
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
RECIPE = Recipe(
    name="nano",
    seed=5,
    corpus="nova_corpus.mixture",
    tokenizer=TokenizerRecipe(vocab=512, documents=300),
    model=MODEL,
    optimizer=OptimizerRecipe(learning_rate=0.01, adam_learning_rate=0.01, warmup_steps=2, stable_steps=2, decay_steps=2),
    stages=(
        Stage(steps=4, rows=2, row_tokens=96, max_exchanges=2),
        Stage(steps=2, rows=1, row_tokens=192, max_exchanges=6, mixture="copying"),
    ),
)


def make(stage: Stage) -> Any:
    return partial(mixture.document, RECIPE.seed, max_exchanges=stage.max_exchanges, mixture=stage.mixture)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(first_texts(make(RECIPE.stages[0]), 300), 512)


def fresh() -> Decoder:
    return init_model(read_config(MODEL), 0)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(left[key], right[key]) for key in left)


def test_digits_are_tokens_and_text_survives(tokenizer) -> None:
    text = 'What is 1234 + 5?\n{"name": "Zoë", "age": 30}'
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert [t for t in tokenizer.encode("1234").tokens] == list("1234")
    assert tokenizer.get_vocab_size() == 512


def test_too_few_merges_are_refused() -> None:
    with pytest.raises(ConfigError, match="tokens"):
        train_tokenizer(["ab"], 512)


def test_batches_are_packed_and_their_iterator_can_be_saved(tokenizer) -> None:
    iterator = batches(make(RECIPE.stages[0]), tokenizer, RECIPE.stages[0])
    batch = [next(iterator) for _ in range(3)][-1]
    assert batch["tokens"].shape == batch["weights"].shape == batch["segments"].shape == (2, 96)
    bos = tokenizer.token_to_id("<|bos|>")
    starts = np.diff(batch["segments"], axis=1, prepend=0) > 0
    assert (batch["tokens"][starts] == bos).all()
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [next(iterator) for _ in range(4)]
    again = batches(make(RECIPE.stages[0]), tokenizer, RECIPE.stages[0])
    again.set_state(state)
    assert all(same(next(again), batch) for batch in rest)


def test_tokens_are_those_of_the_chat_template(tokenizer) -> None:
    batch = next(batches(lambda index: mixture.document(RECIPE.seed, 0, 2), tokenizer, Stage(1, 1, 1024, 2)))
    ids = batch["tokens"][0][batch["segments"][0] == 1].tolist()
    text = "<|bos|>" + "".join(f"<|{s.role}|>{s.text}<|end|>" for s in mixture.document(RECIPE.seed, 0, 2))
    assert ids == tokenizer.encode(text).ids


def test_packed_attention_is_dense_attention_inside_each_document() -> None:
    cfg = read_config(MODEL)
    q, k, v = (jax.random.normal(jax.random.key(i), (24, n, 8)) for i, n in enumerate((4, 2, 2)))
    packed, _ = packed_causal(cfg, jnp.asarray([[1] * 5 + [2] * 7, [1] * 12]))(0, q, k, v, None)
    for part in (slice(0, 5), slice(5, 12), slice(12, 24)):
        alone, _ = dense_causal(cfg, 1)(0, q[part], k[part], v[part], None)
        np.testing.assert_allclose(packed[part], alone, atol=1e-5)


def test_padding_and_unweighted_tokens_do_not_count() -> None:
    graph, params = nnx.split(fresh(), nnx.Param)
    tokens = jnp.arange(16).reshape(1, 16)
    segments, weights = jnp.asarray([[1] * 10 + [0] * 6]), jnp.ones((1, 16)).at[0, :4].set(0.0)
    loss, total = weighted_loss(graph, params, {"tokens": tokens, "segments": segments, "weights": weights}, jnp.float32)
    other, _ = weighted_loss(graph, params, {"tokens": tokens.at[0, 12].set(99), "segments": segments, "weights": weights}, jnp.float32)
    assert total == 6  # targets 4..9
    assert loss == other


def test_the_rate_warms_up_stays_and_decays() -> None:
    schedule = rate(OptimizerRecipe(1.0, 1.0, warmup_steps=10, stable_steps=40, decay_steps=50, final_ratio=0.1, tail_ratio=0.4), 140, 1.0)
    assert [round(float(np.asarray(schedule(step))), 3) for step in (0, 5, 10, 49, 75, 99, 100, 120, 140)] == [
        0.0,
        0.5,
        1.0,
        1.0,
        0.55,
        0.118,
        0.4,
        0.2,
        0.0,
    ]


def test_muon_sees_each_projection_as_one_matrix() -> None:
    axes = matrix_axes(nnx.state(fresh(), nnx.Param))
    attention = axes["layers"][0]["attention"]
    assert (attention["q"].reduction_axis, attention["q"].output_axis) == ((0,), (1, 2))
    assert (attention["o"].reduction_axis, attention["o"].output_axis) == ((0, 1), (2,))
    assert axes["embed"] is None


def test_the_embedding_starts_at_the_asked_deviation() -> None:
    model = fresh()
    scale_embedding(model, 1.0)
    assert float(model.embed.get_value().std()) == pytest.approx(1.0, rel=1e-5)


def test_steps_lower_the_loss_and_a_restored_run_goes_on_the_same(tokenizer, tmp_path) -> None:
    whole = Trainer(RECIPE, fresh(), tokenizer, make, tmp_path / "whole")
    whole.run(lambda _: None, log_every=1, save_every=3)
    assert whole.curve[3].loss < whole.curve[0].loss
    whole.close()
    seen: list[int] = []

    class Stop(Exception): ...

    def stop(point) -> None:
        seen.append(point.step)
        if point.step == 4:
            raise Stop

    cut = Trainer(RECIPE, fresh(), tokenizer, make, tmp_path / "cut")
    with pytest.raises(Stop):
        cut.run(stop, log_every=1, save_every=3)
    cut.close()
    resumed = Trainer(RECIPE, fresh(), tokenizer, make, tmp_path / "cut")
    assert resumed.restore()
    assert resumed.step == 3
    resumed.run(lambda _: None, log_every=1, save_every=100)
    assert [point.loss for point in resumed.curve] == [point.loss for point in whole.curve]
    assert resumed.tokens == whole.tokens
    resumed.close()


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_checkpoint_loads_back_equal(tokenizer, tmp_path, tied) -> None:
    config = {**MODEL, "tie_word_embeddings": tied}
    model = init_model(read_config(config), 0)
    save_checkpoint(model, config, tmp_path)
    save_tokenizer(tokenizer, tmp_path, 256)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.1.self_attn.q_proj.weight"].shape == (32, 32)
    assert ("lm_head.weight" in tensors) is not tied
    assert tensors.keys() == foreign_tensors(model, config).keys()
    loaded = load(tmp_path)
    for (path, ours), (_, theirs) in zip(
        nnx.to_flat_state(nnx.state(model, nnx.Param)),
        nnx.to_flat_state(nnx.state(nnx.merge(loaded.graph, loaded.params), nnx.Param)),
        strict=True,
    ):
        assert jnp.array_equal(ours.get_value().astype(jnp.bfloat16).astype(jnp.float32), theirs.get_value()), path


def test_cached_generation_is_the_dense_forward(tokenizer, tmp_path) -> None:
    save_checkpoint(fresh(), MODEL, tmp_path)
    save_tokenizer(tokenizer, tmp_path, 256)
    generator = load(tmp_path)
    model = nnx.merge(generator.graph, generator.params)
    prompts = [[1, 70, 80, 90], [1, 100, 7, 33, 60, 50, 45]]
    texts = generator.complete(prompts, 6)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt)
        for _ in range(6):
            hidden, _ = model(jnp.asarray(ids), jnp.arange(len(ids)), dense_causal(model.cfg, 1), None)
            ids.append(int(model.logits(hidden[-1:]).argmax()))
            if ids[-1] == generator.end:
                ids.pop()
                break
        assert text == tokenizer.decode(ids[len(prompt) :])


@pytest.mark.parametrize("name", ["nova-small", "nova-draft"])
def test_the_kept_recipes_read(name) -> None:
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    cfg = read_config(recipe.model)
    assert recipe.tokenizer.vocab == cfg.vocab
    assert cfg.vocab % 128 == cfg.embed % 128 == recipe.model["intermediate_size"] % 128 == 0
    assert cfg.max_context_tokens >= 2048


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nsurprise: 1\n")
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        read_recipe(tmp_path / "r.yaml")
