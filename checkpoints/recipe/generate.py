"""A plain batched generator for evaluation: prompts of any length, a contiguous KV cache, greedy or sampled with top-p.

It is the shortest correct reader of a checkpoint, not the engine: the engine's answers are compared with it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from novajax.models.attention import dense_causal
from novajax.models.decoder import Decoder, init_model
from novajax.models.families.keys import match, place
from novajax.models.families.registry import key_map, read_config

MULTIPLE = 32


class Generator:
    """A checkpoint's weights in float32, its tokenizer, and one compiled loop per shape."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.graph, self.params = nnx.split(model)
        self.end = tokenizer.token_to_id("<|end|>")
        self._greedy = jax.jit(self._next)
        self._loop = jax.jit(self._generate, static_argnames=("new_tokens", "top_p", "temperature"))

    def chat(
        self,
        conversations: Sequence[Sequence[tuple[str, str]]],
        new_tokens: int = 96,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """The next assistant message of each conversation, a list of (role, text)."""
        return self.complete([self.encode(turns) for turns in conversations], new_tokens, temperature, top_p, seed)

    def encode(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """The prompt of a conversation as the chat template writes it, up to and with the assistant's control token."""
        text = "<|bos|>" + "".join(f"<|{role}|>{text}<|end|>" for role, text in turns) + "<|assistant|>"
        return self.tokenizer.encode(text).ids

    def guesses(self, ids: Sequence[int]) -> list[int]:
        """The greedy next token after each of `ids`."""
        length = -(-len(ids) // MULTIPLE) * MULTIPLE
        tokens_T = np.zeros(length, np.int32)
        tokens_T[: len(ids)] = ids
        return np.asarray(self._greedy(self.params, tokens_T))[: len(ids)].tolist()

    def _next(self, params: Any, tokens_T: jax.Array) -> jax.Array:
        model = nnx.merge(self.graph, params)
        hidden_TD, _ = model(tokens_T, jnp.arange(tokens_T.shape[0]), dense_causal(model.cfg, 1), None)
        return model.logits(hidden_TD).argmax(-1)

    def complete(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> list[str]:
        """Text up to the end token for each prompt of token ids."""
        longest = -(-max(map(len, prompts)) // MULTIPLE) * MULTIPLE
        tokens_BS = np.zeros((len(prompts), longest), np.int32)
        for row, ids in enumerate(prompts):
            tokens_BS[row, : len(ids)] = ids
        lengths_B = np.asarray([len(ids) for ids in prompts], np.int32)
        out = np.asarray(
            self._loop(self.params, tokens_BS, lengths_B, jax.random.key(seed), new_tokens=new_tokens, top_p=top_p, temperature=temperature)
        )
        texts = []
        for row in out:
            ids = row.tolist()
            texts.append(self.tokenizer.decode(ids[: ids.index(self.end)] if self.end in ids else ids, skip_special_tokens=True))
        return texts

    def _generate(
        self, params: Any, tokens_BS: jax.Array, lengths_B: jax.Array, key: jax.Array, new_tokens: int, top_p: float, temperature: float
    ) -> jax.Array:
        model = nnx.merge(self.graph, params)
        cfg = model.cfg
        rows, prompt = tokens_BS.shape
        total = prompt + new_tokens
        cache = jnp.zeros((2, len(cfg.layers), rows, total, cfg.kv_heads, cfg.head_dim), jnp.float32)

        def forward(tokens_BC: jax.Array, starts_B: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
            width = tokens_BC.shape[1]
            positions_BC = starts_B[:, None] + jnp.arange(width)

            def attend(layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
                row = jnp.arange(rows)[:, None]
                for which, new in enumerate((k_TKH, v_TKH)):
                    cache = cache.at[which, layer, row, positions_BC].set(new.reshape(rows, width, cfg.kv_heads, cfg.head_dim))
                q = q_TNH.reshape(rows, width, cfg.kv_heads, cfg.query_groups, cfg.head_dim)
                scores = jnp.einsum("bqkgh,bskh->bkgqs", q, cache[0, layer]) * cfg.attention_scale
                seen = jnp.arange(total)[None, None] <= positions_BC[:, :, None]  # [B, C, S]
                shares = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
                return jnp.einsum("bkgqs,bskh->bqkgh", shares, cache[1, layer]).reshape(q_TNH.shape), cache

            hidden_TD, cache = model(tokens_BC.reshape(-1), positions_BC.reshape(-1), attend, cache)
            return hidden_TD.reshape(rows, width, -1), cache

        def pick(logits_BV: jax.Array, key: jax.Array) -> jax.Array:
            if temperature == 0.0:
                return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
            scaled = logits_BV / temperature
            ordered = jnp.sort(scaled, axis=-1)[:, ::-1]
            before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
            least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
            return jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf)).astype(jnp.int32)

        hidden, cache = forward(tokens_BS, jnp.zeros(rows, jnp.int32), cache)
        first_B = pick(model.logits(hidden[jnp.arange(rows), lengths_B - 1]), jax.random.fold_in(key, 0))

        def turn(state: tuple[jax.Array, ...], step: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
            token_B, cache = state
            hidden, cache = forward(token_B[:, None], lengths_B + step, cache)
            return (pick(model.logits(hidden[:, 0]), jax.random.fold_in(key, step + 1)), cache), token_B

        _, tokens = jax.lax.scan(turn, (first_B, cache), jnp.arange(new_tokens))
        return tokens.T


def load(directory: Path) -> Generator:
    """A Generator of a checkpoint directory written by the training."""
    config = json.loads((directory / "config.json").read_text())
    cfg = read_config(config)
    model = init_model(cfg, 0)
    rules, tensors = key_map(config, cfg), load_file(directory / "model.safetensors")
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for name, values in tensors.items():
        found = match(rules, name)
        if found is None:
            continue
        shape = params[found.path].get_value().shape
        wide = values.astype(np.float32) if values.dtype == ml_dtypes.bfloat16 else values
        params[found.path].set_value(jnp.asarray(place(found.axes, shape, tuple(slice(0, n) for n in shape), wide)))
    return Generator(model, Tokenizer.from_file(str(directory / "tokenizer.json")))
