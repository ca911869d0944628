"""How a model is cut, as arithmetic: the mesh's axes, the rule table from logical axes to them, and layers over stages.

Free of jax, so that the planner and the step read the same page.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from novajax.core.errors import ConfigError

AXES = ("data", "stage", "context", "tensor", "query")
MANUAL_AXES = ("data", "stage", "context")
"""What the step moves between these is written out in it (`shard_map`); over the others XLA's partitioner decides."""
CUT_AXES = ("tensor", "query")

Rules = Mapping[str, tuple[str, ...]]

DEFAULT_RULES: Rules = MappingProxyType(
    {
        "stage": ("stage",),
        "embed": (),
        "mlp": ("tensor", "query"),
        "heads": ("tensor", "query"),
        "kv_heads": ("tensor",),
        "head_dim": (),
        "vocab": ("stage", "tensor", "query"),
        "experts": (),
    }
)
"""Experts are cut like a dense MLP, across their width: it works for any number of experts, every device has the same
work whatever the router chooses, and a layer keeps its two all-reduces. The vocabulary is cut over the stages too, so
that the embedding and the head are not copied to each."""


def split_tensor_parallel(tensor_parallel: int, kv_heads: int) -> tuple[int, int]:
    """(tensor, query) for a total `tensor_parallel`: KV heads are cut as far as they go, then query heads within their group.

    Raises ConfigError unless one of the two numbers divides the other.
    """
    tensor = math.gcd(tensor_parallel, kv_heads)
    if tensor not in (tensor_parallel, kv_heads):
        raise ConfigError(f"tensor_parallel={tensor_parallel} with {kv_heads} KV heads: one must divide the other", param="tensor_parallel")
    return tensor, tensor_parallel // tensor


def pattern_period(kinds: Sequence[Any]) -> int:
    """The fewest layers after which the kinds repeat."""
    return next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))


def slots_per_stage(kinds: Sequence[Any], stages: int) -> int:
    """n: layers a stage holds, padding included.

    Raises ConfigError when layers of different kinds would meet in one slot.
    """
    if stages == 1:
        return len(kinds)
    period = pattern_period(kinds)
    if period > 1 and period == len(kinds):
        raise ConfigError(f"stage={stages}: the {len(kinds)} layers have no repeating pattern of kinds to cut at", param="stage")
    return -(-len(kinds) // (stages * period)) * period
