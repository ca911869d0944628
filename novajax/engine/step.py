"""The one step program: S decode rows of Y tokens and R x C prefill tokens on one token axis, through the decoder, to logits.

Prefill, chunked prefill, mixed batches and decode are this function with other integers. Only attention sees that there
are two blocks. Padding has position -1: its KV is dropped and nothing reads its result.

On a mesh the function is written for one (data, stage, context) shard: its partition's rows, its stage's layers, its part
of each chunk and of each page. What passes between shards is written here and in `kernels.context`; how matrices are cut
over tensor and query is left to XLA, but for islands. With stages a call is one tick (`parallel.pipeline`): the plan that
enters is embedded, the one that leaves gives logits, and every stage works on the plan that is with it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from novajax.engine.attend import chunk_positions, paged_attend
from novajax.engine.buckets import Bucket
from novajax.engine.inputs import GUESS_COLUMN, NO_GUESS, unpack
from novajax.engine.layout import DECODE_TRANSIT, PACKED, PREFILL_TRANSIT, ROWS, Layout, pool_specs
from novajax.kv.pool import KVPool
from novajax.models.decoder import Decoder
from novajax.models.stages import is_staged
from novajax.parallel.axes import MANUAL_AXES
from novajax.parallel.pipeline import from_stage, hand_on
from novajax.parallel.rules import only


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transit:
    """Activations on their way from stage to stage, for the largest step. Donated to each tick."""

    decode: jax.Array  # [stages, data * S, D]
    prefill: jax.Array  # [stages, data * R, C, D]


class Scored(NamedTuple):
    """Logits about every token of the prefill block, and the tokens that follow them."""

    logits: jax.Array  # f32[data * R * C, V]
    targets: jax.Array  # i32[data * R * C]


class Stepped(NamedTuple):
    """What a step returns. Rows are those of the plan that leaves the pipeline, partition by partition."""

    pool: KVPool
    transit: Transit | None
    logits: jax.Array  # f32[data * rows, V], zeros behind the bucket's own rows
    draws: jax.Array  # i32[data * rows, columns]
    scored: Scored | None


def forward(
    graphdef: Any,
    weights: Any,
    pool: KVPool,
    transit: Transit | None,
    last_tokens: jax.Array,  # i32[slots], the newest token of every slot
    guesses: jax.Array | None,  # i32[slots, Y - 1 or more], a draft model's; None: there is none
    packed: jax.Array,  # i32[data, stages, words], `inputs.pack` of the plans in the pipeline
    *,
    layout: Layout,
    bucket: Bucket,
    rows: int,
) -> Stepped:
    """One step. Donates: pool, transit."""
    body = partial(_forward, graphdef, layout=layout, bucket=bucket, rows=rows)
    if layout.alone:
        return body(weights, pool, transit, last_tokens, guesses, packed)
    specs = jax.tree.map(partial(only, MANUAL_AXES), result_specs(pool, transit is not None, bucket.score), is_leaf=_is_spec)
    cut = jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=(_weight_specs(weights, layout.stages), specs.pool, specs.transit, ROWS, ROWS, PACKED),
        out_specs=specs,
        axis_names=set(MANUAL_AXES),
        check_vma=False,
    )
    return cut(weights, pool, transit, last_tokens, guesses, packed)


def result_specs(pool: KVPool, staged: bool, scored: bool) -> Any:
    """A `Stepped` of partition specs: how results lie on the mesh. The pool's and the transit's are those of the arguments too."""
    rows: Any = ROWS
    moving: tuple[Any, Any] = (DECODE_TRANSIT, PREFILL_TRANSIT)
    return Stepped(pool_specs(pool), Transit(*moving) if staged else None, rows, rows, Scored(rows, rows) if scored else None)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _forward(
    graphdef: Any,
    weights: Any,
    pool: KVPool,
    transit: Transit | None,
    last_tokens: jax.Array,
    guesses: jax.Array | None,
    packed: jax.Array,
    *,
    layout: Layout,
    bucket: Bucket,
    rows: int,
) -> Stepped:
    """One shard's part of `forward`."""
    stages = layout.stages
    model: Decoder = nnx.merge(graphdef, _own_layers(weights, stages))
    stage = lax.axis_index("stage") if stages > 1 else 0
    shard = lax.axis_index("context") if layout.context > 1 else 0
    here = unpack(lax.dynamic_index_in_dim(packed[0], stage, 0, keepdims=False), bucket)
    entering = unpack(packed[0, 0], bucket)
    tokens_SY = decode_tokens(entering, last_tokens, guesses)
    x_TD = _embed(model, _tokens(entering, tokens_SY, bucket, layout.context, shard), stage, stages)
    if transit is not None:
        x_TD = jnp.where(stage == 0, x_TD, _arrived(transit, bucket, layout.context))
    positions_T = _positions(here, bucket, layout.context, shard)
    attend = paged_attend(model.cfg, here, positions_T, bucket, layout)
    layers_here = None if stages == 1 else jnp.clip(len(layout.model.layers) - stage * layout.slots, 0, layout.slots)
    x_TD, pool = model.run(x_TD, jnp.maximum(positions_T, 0), attend, pool, layers_here)

    leaving = unpack(packed[0, stages - 1], bucket)
    logits_XV = _logits(model, _drawing(x_TD, leaving, bucket, layout.context, shard), stages)
    padding = ((0, rows - bucket.rows), (0, 0))
    drawn = leaving["draws"]
    if bucket.drafts:  # guesses are of one stage: what enters leaves
        drawn = drawn.at[: bucket.decode_tokens, GUESS_COLUMN].set(tokens_SY.at[:, 0].set(NO_GUESS).reshape(-1))
    draws = jnp.pad(drawn, padding, constant_values=last_tokens.shape[0])  # the slot past the end: draws into nothing
    scored = Scored(_logits(model, _chunks(x_TD, bucket, layout.context), stages), leaving["targets"]) if bucket.score else None
    moving = None if transit is None else _departed(transit, hand_on(x_TD, stages), bucket, layout.context)
    return Stepped(pool, moving, jnp.pad(logits_XV, padding), draws, scored)


def _weight_specs(weights: Any, stages: int) -> Any:
    """Layers and the vocabulary are cut over the stages."""

    def spec(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("axes")
        return variable.replace(PartitionSpec(*("stage" if name in ("stage", "vocab") and stages > 1 else None for name in axes)))

    return nnx.from_flat_state([(path, spec(path, variable)) for path, variable in nnx.to_flat_state(weights)])


def _own_layers(weights: Any, stages: int) -> Any:
    """The local weights without the axis over the stages, which has size 1 here."""
    if stages == 1:
        return weights
    flat = nnx.to_flat_state(weights)
    return nnx.from_flat_state([(path, v.replace(v.get_value()[0]) if is_staged(path, stages) else v) for path, v in flat])


def decode_tokens(x: dict[str, jax.Array], last_tokens: jax.Array, guesses: jax.Array | None) -> jax.Array:
    """i32[S, Y]: the token and the guesses of each decode row, those that never left the device among them."""
    given_SY = x["decode_token"]
    held_SY = last_tokens.at[x["decode_slot"]].get(mode="clip")[:, None]
    if guesses is not None:
        held_SY = jnp.concatenate([held_SY, guesses.at[x["decode_slot"]].get(mode="clip")], axis=1)[:, : given_SY.shape[1]]
    return jnp.where(given_SY < 0, held_SY, given_SY)


def _tokens(x: dict[str, jax.Array], tokens_SY: jax.Array, bucket: Bucket, shards: int, shard: jax.Array | int) -> jax.Array:
    """i32[T]: the token ids of a plan's step, this shard's part of each chunk."""
    tokens_S = tokens_SY.reshape(-1)
    if not bucket.prefill_rows:
        return tokens_S
    part = bucket.chunk_tokens // shards
    mine = x["prefill_tokens"] if shards == 1 else lax.dynamic_slice_in_dim(x["prefill_tokens"], shard * part, part, axis=1)
    return jnp.concatenate([tokens_S, mine.reshape(-1)])


def _positions(x: dict[str, jax.Array], bucket: Bucket, shards: int, shard: jax.Array | int) -> jax.Array:
    """i32[T], -1 for padding."""
    positions_S = x["decode_position"].reshape(-1)
    if not bucket.prefill_rows:
        return positions_S
    return jnp.concatenate([positions_S, chunk_positions(x, bucket.chunk_tokens // shards, shard).reshape(-1)])


def _embed(model: Decoder, tokens_T: jax.Array, stage: Any, stages: int) -> jax.Array:
    """The rows of the embedding, of which each stage holds a part."""
    if stages == 1:
        return model.scale(model.rows(tokens_T))
    here = model.embed.shape[0]
    local = tokens_T - stage * here
    mine = (local >= 0) & (local < here)
    rows_TD = jnp.where(mine[:, None], model.rows(jnp.where(mine, local, 0)), 0)
    return model.scale(lax.psum(rows_TD, "stage"))


def _drawing(x_TD: jax.Array, leaving: dict[str, jax.Array], bucket: Bucket, shards: int, shard: jax.Array | int) -> jax.Array:
    """[X, D]: the decode rows and the last token of each chunk, which one context shard has."""
    if not bucket.prefill_rows:
        return x_TD
    s, part = bucket.decode_tokens, bucket.chunk_tokens // shards
    last_R = jnp.maximum(leaving["prefill_length"] - 1, 0)
    at_R = s + jnp.arange(bucket.prefill_rows) * part + last_R % part
    rows_RD = x_TD[at_R]
    if shards > 1:
        rows_RD = lax.psum(jnp.where((last_R // part == shard)[:, None], rows_RD, 0), "context")
    return jnp.concatenate([x_TD[:s], rows_RD])


def _chunks(x_TD: jax.Array, bucket: Bucket, shards: int) -> jax.Array:
    """[R * C, D]: all tokens of the prefill block."""
    chunks = x_TD[bucket.decode_tokens :].reshape(bucket.prefill_rows, bucket.chunk_tokens // shards, -1)
    if shards > 1:
        chunks = lax.all_gather(chunks, "context", axis=1, tiled=True)
    return chunks.reshape(-1, x_TD.shape[1])


def _logits(model: Decoder, x_XD: jax.Array, stages: int) -> jax.Array:
    """f32[X, V]. Each stage has a part of the vocabulary, the last one the activations."""
    if stages == 1:
        return model.logits(model.final_norm(x_XD))
    part_XV = model.logits(model.final_norm(from_stage(x_XD, stages - 1)))
    return lax.all_gather(part_XV, "stage", axis=1, tiled=True)


def _arrived(transit: Transit, bucket: Bucket, shards: int) -> jax.Array:
    """[T, D]: what the stage before handed on, in the shape of this tick."""
    s, r, c = bucket.decode_rows, bucket.prefill_rows, bucket.chunk_tokens // shards
    decode = transit.decode[0, :s]
    return jnp.concatenate([decode, transit.prefill[0, :r, :c].reshape(r * c, -1)]) if r else decode


def _departed(transit: Transit, x_TD: jax.Array, bucket: Bucket, shards: int) -> Transit:
    s, r, c = bucket.decode_rows, bucket.prefill_rows, bucket.chunk_tokens // shards
    decode = transit.decode.at[0, :s].set(x_TD[:s])
    prefill = transit.prefill.at[0, :r, :c].set(x_TD[s:].reshape(r, c, -1)) if r else transit.prefill
    return Transit(decode, prefill)
