"""A small model that guesses for a large one: it runs over every step's tokens in pages of its own, which lie like the large model's.

Both pools have the same pages and the same tables, so that a page that is shared, given back or kept for its prefix means the same in
both. A step without guesses is followed, so that the draft model's KV is always as complete as the large one's. For a step with guesses
it takes one token at a time, as often as there are guesses and once more, so that all that can prove right is in its KV. It draws like
the large model, with the noise of the same positions (`sampler.sample`), but for penalties: both then often draw the same token even
where neither is certain (arXiv 2408.07978). One device.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from novajax.core.config import EngineConfig
from novajax.core.errors import ConfigError
from novajax.engine.attend import chunk_positions, paged_attend
from novajax.engine.buckets import Bucket
from novajax.engine.inputs import unpack, unpack_draws
from novajax.engine.layout import EVERYWHERE, Layout
from novajax.engine.sampler import draw
from novajax.engine.step import decode_tokens
from novajax.kv.pool import KVPool, abstract_pool, pool_bytes
from novajax.models.config import ModelConfig
from novajax.models.decoder import Decoder
from novajax.models.precision import native_state
from novajax.text.tokenizer import Tokenizer
from novajax.weights.load import Description, describe, load_model


@dataclass(frozen=True)
class DraftModel:
    """Arrays may be abstract."""

    layout: Layout
    graphdef: Any
    state: Any
    pool: KVPool
    most: int
    """Guesses of a row at most."""


def describe_draft(config: EngineConfig, target: Description, layout: Layout) -> Description:
    """The model of `config.draft_model`. Raises ConfigError on several devices and for one with other tokens than `target`."""
    if not layout.alone:
        raise ConfigError(f"a draft model works on one device, not on {layout.mesh.size}", param="draft_model")
    draft = describe(config.draft_model)
    if draft.config.vocab != target.config.vocab:
        sizes = f"{draft.config.vocab} tokens, {target.directory} {target.config.vocab}"
        raise ConfigError(f"draft model {draft.directory} has {sizes}", param="draft_model")
    directories = (draft.directory, target.directory)
    if all((directory / "tokenizer.json").is_file() for directory in directories):
        one, other = map(Tokenizer, directories)
        if not one.same_tokens(other):
            raise ConfigError(f"the tokens of draft model {one.directory} are not those of {other.directory}", param="draft_model")
    return draft


def draft_pool(model: ModelConfig, pages: int, page_tokens: int, dtype: Any) -> KVPool:
    """The shapes of its pages."""
    return abstract_pool(len(model.layers), pages, model.kv_heads, page_tokens, model.head_dim, dtype)


def draft_page_bytes(model: ModelConfig, page_tokens: int, dtype: Any) -> int:
    """What a page of the large model's pool costs more."""
    return pool_bytes(draft_pool(model, 1, page_tokens, dtype))


def load_draft(draft: Description, target: Layout, pages: int, page_tokens: int, dtype: Any, most: int, *, verify: bool) -> DraftModel:
    """Its weights on the device of `target`; the pool is abstract. Raises like `weights.load.load_model`."""
    layout = Layout(target.mesh, draft.config, kernels=target.kernels)
    loaded = load_model(draft, target.mesh, dtype, verify=verify)
    state = native_state(draft.config, loaded.state) if layout.kernels == "native" else loaded.state
    pool = jax.tree.map(lambda array: layout.abstract(array, EVERYWHERE), draft_pool(draft.config, pages, page_tokens, dtype))
    return DraftModel(layout, loaded.graphdef, state, pool, most)


def follow(
    graphdef: Any,
    weights: Any,
    pool: KVPool,
    last_tokens: jax.Array,  # i32[slots]
    packed: jax.Array,  # i32[1, 1, words], the step's own upload
    *,
    layout: Layout,
    bucket: Bucket,
    most: int,
) -> tuple[KVPool, jax.Array]:
    """(pool with the step's tokens, guesses i32[slots, most] for `step.forward`). Donates: pool."""
    model: Decoder = nnx.merge(graphdef, weights)
    x = unpack(packed[0, 0], bucket)
    slots = last_tokens.shape[0]
    tokens_S = decode_tokens(x, last_tokens, None)[:, 0]
    if not bucket.drafts:
        tokens_T, positions_T = tokens_S, x["decode_position"][:, 0]
        if bucket.prefill_rows:
            tokens_T = jnp.concatenate([tokens_T, x["prefill_tokens"].reshape(-1)])
            positions_T = jnp.concatenate([positions_T, chunk_positions(x, bucket.chunk_tokens, 0).reshape(-1)])
        _, pool = _run(model, x, tokens_T, positions_T, pool, bucket, layout)
        return pool, jnp.zeros((slots, most), jnp.int32)
    one = Bucket(bucket.decode_rows, 0, 0, bucket.table_pages)
    draws_YSC = x["draws"].reshape(bucket.decode_rows, 1 + bucket.drafts, -1).transpose(1, 0, 2)

    def guess(held: tuple[KVPool, jax.Array], now: tuple[jax.Array, jax.Array]) -> tuple[tuple[KVPool, jax.Array], jax.Array]:
        (pool, tokens_S), (positions_S, draws_SC) = held, now
        x_SD, pool = _run(model, x, tokens_S, positions_S, pool, one, layout)
        tokens_S = draw(model.logits(model.final_norm(x_SD)), unpack_draws(draws_SC))
        return (pool, tokens_S), tokens_S

    (pool, _), guesses_YS = lax.scan(guess, (pool, tokens_S), (x["decode_position"].T, draws_YSC))
    guesses = jnp.zeros((slots, most), jnp.int32)
    return pool, guesses.at[x["decode_slot"], : bucket.drafts].set(guesses_YS[: bucket.drafts].T, mode="drop")


def _run(
    model: Decoder, x: dict[str, jax.Array], tokens_T: jax.Array, positions_T: jax.Array, pool: KVPool, bucket: Bucket, layout: Layout
) -> tuple[jax.Array, KVPool]:
    attend = paged_attend(model.cfg, x, positions_T, bucket, layout)
    return model.run(model.scale(model.rows(tokens_T)), jnp.maximum(positions_T, 0), attend, pool)
