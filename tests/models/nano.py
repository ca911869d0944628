"""Loading and running nano checkpoints for the parity tests."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from novajax.models.attention import Attend, dense_causal
from novajax.models.config import ModelConfig
from novajax.models.decoder import abstract_model
from novajax.models.families import keys
from novajax.models.families.registry import key_map, read_config

NANO = Path(__file__).parents[1] / "data" / "nano"


class Loaded:
    """A checkpoint in float32, with its compiled forward passes."""

    def __init__(self, directory: Path):
        self.cfg, self.graph, self.state = _load(directory)
        self._forward = jax.jit(self._dense)
        self._step = jax.jit(self._cached)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [S, V] of one row by the dense causal attend."""
        return np.asarray(self._forward(self.state, jnp.asarray(tokens, jnp.int32)))

    def greedy(self, prompt: np.ndarray, count: int) -> list[int]:
        """The continuation through a cache, every token of prompt and answer in a step of its own."""
        cache = [jnp.zeros((2, len(prompt) + count, self.cfg.kv_heads, self.cfg.head_dim)) for _ in self.cfg.layers]
        tokens = prompt.tolist()
        for position in range(len(prompt) + count - 1):
            best, cache = self._step(self.state, jnp.asarray([tokens[position]], jnp.int32), jnp.asarray([position], jnp.int32), cache)
            if position + 1 >= len(prompt):
                tokens.append(int(best))
        return tokens[len(prompt) :]

    def _dense(self, state: nnx.State, tokens_T: jax.Array) -> jax.Array:
        model = nnx.merge(self.graph, state)
        hidden, _ = model(tokens_T, jnp.arange(tokens_T.shape[0]), dense_causal(self.cfg, 1), None)
        return model.logits(hidden)

    def _cached(self, state: nnx.State, tokens_T: jax.Array, positions_T: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(self.graph, state)
        hidden, cache = model(tokens_T, positions_T, _attend_cache(self.cfg, positions_T), cache)
        return jnp.argmax(model.logits(hidden[-1:])[0]), cache


def _attend_cache(cfg: ModelConfig, positions_T: jax.Array) -> Attend:
    """Attention over per-layer arrays [2, capacity, K, H] that hold keys and values by position."""

    def attend(layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        pair = cache[layer].at[:, positions_T].set(jnp.stack([k_TKH, v_TKH]))
        keys_SNH, values_SNH = (jnp.repeat(part, cfg.query_groups, axis=1) for part in pair)
        scores = jnp.einsum("tnh,snh->nts", q_TNH, keys_SNH) * cfg.attention_scale
        if cfg.attention_softcap:
            scores = cfg.attention_softcap * jnp.tanh(scores / cfg.attention_softcap)
        distance = positions_T[:, None] - jnp.arange(pair.shape[1])[None, :]
        seen = (distance >= 0) & (distance < (cfg.layers[layer].window or pair.shape[1]))
        shares = jax.nn.softmax(jnp.where(seen, scores, -1e30))
        return jnp.einsum("nts,snh->tnh", shares, values_SNH), [*cache[:layer], pair, *cache[layer + 1 :]]

    return attend


def _load(directory: Path) -> tuple[ModelConfig, nnx.GraphDef, nnx.State]:
    """A Hugging Face directory with one safetensors file, in float32, through the family's key map."""
    config = json.loads((directory / "config.json").read_text())
    cfg = read_config(config)
    graph, state = nnx.split(abstract_model(cfg))
    variables = dict(nnx.to_flat_state(state))
    values = {path: np.zeros(variable.shape, np.float32) for path, variable in variables.items()}
    filled = {path: 0 for path in variables}
    rules = key_map(config, cfg)
    for name, tensor in load_file(directory / "model.safetensors").items():
        found = keys.match(rules, name)
        if found is None:
            continue
        whole = values[found.path]
        right = found.axes.split("->")[1].split()
        index = tuple(
            slice(found.stacked[letter], found.stacked[letter] + 1) if letter in found.stacked else slice(None) for letter in right
        )
        assert tensor.shape == keys.source_shape(found.axes, whole.shape), name
        whole[index] = keys.place(found.axes, whole.shape, index, tensor[keys.source_slice(found.axes, whole.shape, index)])
        filled[found.path] += whole[index].size
    for path, variable in variables.items():
        assert filled[path] == values[path].size, f"{path}: {filled[path]} of {values[path].size} values were in the file"
        variable.set_value(jnp.asarray(values[path]))
    return cfg, graph, state


def nano_names() -> tuple[str, ...]:
    return tuple(sorted(path.name for path in NANO.iterdir()))
