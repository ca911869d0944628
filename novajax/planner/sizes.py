"""A model as numbers: every array's shape, its logical axes and what it is for. Filled in from the abstract module by
`models.sizes`, so that nothing about a parameter is written twice; here is only arithmetic.
"""

import math
from typing import Literal

import msgspec

Component = Literal["embedding", "attention_qkv", "attention_out", "mlp", "norm", "head"]
"""The rows of a precision profile. `norm` also holds biases and routers, which are never quantized."""


class Array(msgspec.Struct, frozen=True):
    """One parameter array."""

    name: str
    component: Component
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical names, one a dimension: embed mlp heads kv_heads head_dim vocab experts, or None."""
    contracted: tuple[int, ...]
    """The dimensions that a multiplication sums over; the others have a quantization scale each."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class LayerSizes(msgspec.Struct, frozen=True):
    """One kind of layer."""

    arrays: tuple[Array, ...]
    window: int | None
    """Tokens a query sees; None: all."""
    experts: int = 1
    experts_per_token: int = 1


class ModelSizes(msgspec.Struct, frozen=True, kw_only=True):
    """A whole decoder. `layers` are indices into `kinds`, in order."""

    kinds: tuple[LayerSizes, ...]
    layers: tuple[int, ...]
    ends: tuple[Array, ...]
    """Embedding, final norm and, unless tied, the head."""
    vocab: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context_tokens: int

    @property
    def parameters(self) -> int:
        """Exact; a tied embedding counts once."""
        by_kind = [sum(array.elements for array in kind.arrays) for kind in self.kinds]
        return sum(by_kind[index] for index in self.layers) + sum(array.elements for array in self.ends)

    @property
    def period(self) -> int:
        """Layers until the pattern of kinds repeats, like 6 for five local layers and a global one."""
        count = len(self.layers)
        return next(p for p in range(1, count + 1) if all(self.layers[i] == self.layers[i - p] for i in range(p, count)))

    @property
    def tied(self) -> bool:
        return not any(array.component == "head" for array in self.ends)

    def head(self) -> Array:
        """What hidden states are multiplied by to get logits."""
        return next(array for array in self.ends if array.component == ("embedding" if self.tied else "head"))

    def seen_tokens(self, context_tokens: float) -> list[float]:
        """By kind of layer: how many tokens of a context of that length a query attends to."""
        return [context_tokens if kind.window is None else min(context_tokens, kind.window) for kind in self.kinds]
