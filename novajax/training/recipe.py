"""A recipe: everything that decides a training run, read from one YAML file. Values only; free of jax.

Module names in a recipe are looked up beside the file, so that a recipe and its corpus travel together.
"""

from pathlib import Path
from typing import Any

import msgspec

from novajax.core.errors import ConfigError


class TokenizerRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A new tokenizer of `vocab` entries from the first `documents` documents, or the one in `reuse` (a directory beside the output)."""

    vocab: int
    documents: int = 0
    reuse: str = ""


class OptimizerRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Muon for the matrices of the layers, Adam for the embedding, the head and the norms.

    Both rates warm up for `warmup_steps`, stay for `stable_steps`, and fall linearly to `final_ratio` in `decay_steps`. What steps are left
    (a stage of longer rows, say) start again at `tail_ratio` and fall to zero.
    """

    learning_rate: float
    """Muon's; the update of a matrix has this times 0.2 as its root mean square."""
    adam_learning_rate: float
    warmup_steps: int
    stable_steps: int
    decay_steps: int
    final_ratio: float = 0.0
    tail_ratio: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`steps` steps over batches of `rows` rows with `row_tokens` tokens each."""

    steps: int
    rows: int
    row_tokens: int
    max_exchanges: int
    mixture: str = "main"
    """The corpus's name for what its documents are about."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`model` is a Hugging Face config.json as a mapping: the checkpoint carries it word for word."""

    name: str
    seed: int
    corpus: str
    evaluate: str = ""
    tokenizer: TokenizerRecipe
    model: dict[str, Any]
    optimizer: OptimizerRecipe
    stages: tuple[Stage, ...]
    generation: dict[str, Any] = {}
    embedding_std: float = 1.0
    """Random embedding rows start with this standard deviation. At 1 the token stays readable beside what the layers add. Measured on a
    copying mixture, 160 steps: loss 1.40 with 1 and a head of its own, 1.64 with 1/sqrt(embed) and a tied head."""

    @property
    def steps(self) -> int:
        """All steps of all stages."""
        return sum(stage.steps for stage in self.stages)


def read_recipe(path: Path) -> Recipe:
    """Raises ConfigError naming what the file has wrong."""
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=Recipe)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path.name}: {error}") from error
