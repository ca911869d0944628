"""python -m novajax.train --recipe=FILE.yaml --output=DIR: corpus, tokenizer, training, a Hugging Face checkpoint and its evaluation.

The corpus and the evaluation are Python modules beside the recipe; the recipe names them. Run again after a stop, it
goes on from the last sealed state.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import msgspec
from absl import flags
from rich.console import Console
from tokenizers import Tokenizer

from novajax.models.decoder import Decoder, init_model, parameter_count
from novajax.models.families.registry import read_config
from novajax.training.data import Document
from novajax.training.export import save_checkpoint
from novajax.training.loop import MakeDocument, Point, Trainer
from novajax.training.optimizer import scale_embedding
from novajax.training.recipe import Recipe, Stage, read_recipe
from novajax.training.tokens import first_texts, save_tokenizer, train_tokenizer

COMPUTE = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def define_flags() -> flags.FlagValues:
    """The flags of this command, in a set of their own."""
    values = flags.FlagValues()
    flags.DEFINE_string("recipe", None, "The recipe, a YAML file.", flag_values=values, required=True)
    flags.DEFINE_string("output", None, "Where the checkpoint goes; beside the recipe's folder by default.", flag_values=values)
    flags.DEFINE_string("work", None, "Where sealed training states go; .cache/training/NAME by default.", flag_values=values)
    flags.DEFINE_enum("compute", "bfloat16", sorted(COMPUTE), "What matrices are multiplied in.", flag_values=values)
    flags.DEFINE_integer("export_every", 200, "Steps between exports of the weights.", flag_values=values)
    flags.DEFINE_bool("evaluate", True, "Run the recipe's evaluation at the end.", flag_values=values)
    return values


def tokenizer_of(recipe: Recipe, make: MakeDocument, output: Path) -> Tokenizer:
    """The recipe's tokenizer, trained if it is not there yet, with its files in `output`."""
    context_tokens = int(recipe.model["max_position_embeddings"])
    kept = output.parent / recipe.tokenizer.reuse / "tokenizer.json" if recipe.tokenizer.reuse else output / "tokenizer.json"
    if kept.exists():
        tokenizer = Tokenizer.from_file(str(kept))
    else:
        tokenizer = train_tokenizer(first_texts(make(recipe.stages[-1]), recipe.tokenizer.documents), recipe.tokenizer.vocab)
    save_tokenizer(tokenizer, output, context_tokens)
    return tokenizer


def export(model: Decoder, recipe: Recipe, trainer: Trainer, output: Path) -> None:
    """The checkpoint as it stands, with the recipe and the loss curve."""
    save_checkpoint(model, recipe.model, output)
    (output / "generation_config.json").write_text(json.dumps(recipe.generation, indent=2) + "\n")
    record = {
        "recipe": msgspec.to_builtins(recipe),
        "parameters": parameter_count(model.cfg),
        "tokens": trainer.tokens,
        "elapsed_s": trainer.elapsed_s,
        "curve": msgspec.to_builtins(trainer.curve),
    }
    (output / "training.json").write_text(json.dumps(record) + "\n")


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    values = define_flags()
    values(argv)
    path = Path(values.recipe).absolute()
    recipe, console = read_recipe(path), Console(highlight=False, markup=False, soft_wrap=True)
    output = Path(values.output) if values.output else path.parent.parent / recipe.name
    sys.path.insert(0, str(path.parent))
    corpus = importlib.import_module(recipe.corpus)

    def make(stage: Stage) -> Document:
        return partial(corpus.document, recipe.seed, max_exchanges=stage.max_exchanges, mixture=stage.mixture)

    tokenizer = tokenizer_of(recipe, make, output)
    model = init_model(read_config(recipe.model), recipe.seed)
    scale_embedding(model, recipe.embedding_std)
    console.print(f"{recipe.name}: {parameter_count(model.cfg):,} parameters, {recipe.steps} steps")
    trainer = Trainer(recipe, model, tokenizer, make, Path(values.work or f".cache/training/{recipe.name}"), COMPUTE[values.compute])
    try:
        if trainer.restore():
            console.print(f"going on from step {trainer.step}")

        def report(point: Point) -> None:
            rate = point.tokens / max(point.elapsed_s, 1e-9)
            place = f"step {point.step}/{recipe.steps}"
            console.print(f"{place} loss {point.loss:.4f} norm {point.gradient_norm:.2f} tokens {point.tokens:,} ({rate:,.0f} tokens/s)")
            if point.step % values.export_every == 0:
                export(trainer.model, recipe, trainer, output)

        trainer.run(report)
        export(trainer.model, recipe, trainer, output)
    finally:
        trainer.close()
    if values.evaluate and recipe.evaluate:
        importlib.import_module(recipe.evaluate).write_report(output, console.print)


if __name__ == "__main__":
    main(sys.argv)
