"""NovaJAX: an LLM inference engine in one compiled JAX program. Importing this package imports no jax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from novajax.core.types import SamplingParams
    from novajax.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Loads the two public names on first use, so that host-only processes never pay for jax."""
    if name == "LLM":
        from novajax.llm import LLM

        return LLM
    if name == "SamplingParams":
        from novajax.core.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'novajax' has no attribute {name!r}")
