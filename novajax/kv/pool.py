"""The device half of the KV cache: arrays of pages, declared here, written by the step, planned by `kv.manager`."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgspec

Kind = Literal["int8", "int4", "fp8"]
STORED: dict[Kind, Any] = {"int8": jnp.int8, "int4": jnp.uint8, "fp8": jnp.float8_e4m3fn}
"""What an element of the array is: int4 lies in pairs in a byte (`kernels.nibbles`)."""


class CacheFormat(msgspec.Struct, frozen=True):
    """How the pool holds numbers; None: as the engine computes them, else rounded with a scale for each token and head."""

    keys: Kind | None = None
    values: Kind | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Paged:
    """The keys of all layers, or the values: head-major inside a page so that a (page, head) is one contiguous block."""

    numbers: Any  # [L, P, K, page, H], for int4 uint8[L, P, K, page, H / 2]
    scale: Any = None  # float32[L, P, K, page] where the numbers are rounded

    @property
    def kind(self) -> Kind | None:
        """How the numbers are rounded."""
        if self.scale is None:
            return None
        return next(kind for kind, dtype in STORED.items() if self.numbers.dtype == dtype)

    @property
    def pages(self) -> int:
        return self.numbers.shape[1]

    @property
    def page_tokens(self) -> int:
        return self.numbers.shape[3]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPool:
    """The arrays are donated to each step and come back written in place."""

    keys: Paged
    values: Paged


def abstract_pool(
    layers: int, pages: int, kv_heads: int, page_tokens: int, head_dim: int, dtype: jnp.dtype, form: CacheFormat = CacheFormat()
) -> KVPool:
    """Shapes only: what capacity arithmetic and ahead-of-time compilation read. int4 needs an even `head_dim`."""

    def paged(kind: Kind | None) -> Paged:
        tokens = (layers, pages, kv_heads, page_tokens)
        if kind is None:
            return Paged(jax.ShapeDtypeStruct((*tokens, head_dim), dtype))
        width = head_dim // 2 if kind == "int4" else head_dim
        return Paged(jax.ShapeDtypeStruct((*tokens, width), STORED[kind]), jax.ShapeDtypeStruct(tokens, jnp.float32))

    return KVPool(paged(form.keys), paged(form.values))


def pool_bytes(pool: KVPool) -> int:
    """Bytes of all arrays of a pool, or of the shapes of one."""
    return sum(math.prod(part.shape) * jnp.dtype(part.dtype).itemsize for part in jax.tree.leaves(pool))


def page_bytes(layers: int, kv_heads: int, page_tokens: int, head_dim: int, dtype: jnp.dtype, form: CacheFormat = CacheFormat()) -> int:
    """Bytes of one page over all layers, keys and values with their scales."""
    return pool_bytes(abstract_pool(layers, 1, kv_heads, page_tokens, head_dim, dtype, form))
