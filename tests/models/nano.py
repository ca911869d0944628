"""Loading and running nano checkpoints for the parity tests."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from novajax.models.attention import Attend, dense_causal
from novajax.models.config import ModelConfig
from novajax.parallel.mesh import make_mesh
from novajax.telemetry.progress import Silent
from novajax.weights.load import load_model

NANO = Path(__file__).parents[1] / "data" / "nano"


class Loaded:
    """A checkpoint in float32, with its compiled forward passes."""

    def __init__(self, directory: Path):
        loaded = load_model(directory, make_mesh(), jnp.float32, progress=Silent, verify=False)
        self.cfg, self.graph, self.state = loaded.config, loaded.graphdef, loaded.state
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


def nano_names() -> tuple[str, ...]:
    return tuple(sorted(path.name for path in NANO.iterdir()))
