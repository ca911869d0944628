"""The device half of the KV cache: two arrays of pages, declared here, written by the step, planned by `kv.manager`."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPool:
    """Keys and values of all layers, head-major inside a page so that a (page, head) is one contiguous block.

    The arrays are donated to each step and come back written in place.
    """

    keys: jax.Array  # [L, P, K, page, H]
    values: jax.Array  # [L, P, K, page, H]


def abstract_pool(layers: int, pages: int, kv_heads: int, page_tokens: int, head_dim: int, dtype: jnp.dtype) -> KVPool:
    """Shapes only: what capacity arithmetic and ahead-of-time compilation read."""
    block: Any = jax.ShapeDtypeStruct((layers, pages, kv_heads, page_tokens, head_dim), dtype)
    return KVPool(block, block)


def page_bytes(layers: int, kv_heads: int, page_tokens: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Bytes of one page over all layers, keys and values."""
    return 2 * layers * kv_heads * page_tokens * head_dim * jnp.dtype(dtype).itemsize
