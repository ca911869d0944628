"""What the loop needs of whoever runs its plans: the executor itself, or one that leads the executors of other processes.

Plans are dispatched in the order of their numbers; `collect` takes them in the same order. No jax here, so that host code can
stand in for a device in tests.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from novajax.core.types import TokenLogprobs
from novajax.scheduler.plan import StepPlan, TokenResult


class Landed(Protocol):
    """What a step brought home, by slot."""

    @property
    def number(self) -> int: ...
    @property
    def tokens(self) -> Mapping[int, TokenResult]: ...
    @property
    def prompt_logprobs(self) -> Mapping[int, Sequence[TokenLogprobs]]: ...


class Runner(Protocol):
    """See the module docstring."""

    def dispatch(self, plan: StepPlan) -> Any:
        """Enqueues one plan and returns at once; None if nothing comes of it yet."""
        ...

    def collect(self, pending: Any) -> Landed:
        """Waits for a dispatched step. Only reads: another thread than the dispatching one may call it."""
        ...

    def close(self) -> None: ...
