"""Counts one request's tokens and time while its pieces come, for `usage` and `timings`.

Invariants: each prompt counts once however many alternatives continue it; a piece's tokens count as they come, and the engine's own
final number takes their place. It knows no wire format but the two replies it makes.
"""

from collections.abc import Sequence

from novajax.core.types import Timing, Usage
from novajax.server.replies import PromptDetails, Timings, UsageReply


class Account:
    """`prompts`: the token ids of each prompt."""

    def __init__(self, prompts: Sequence[Sequence[int]]):
        self._prompt_tokens = [len(prompt) for prompt in prompts]
        self._cached = [0] * len(prompts)
        self._output: dict[tuple[int, int], int] = {}
        self._timings: list[Timing] = []

    def add(self, prompt: int, alternative: int, tokens: int, usage: Usage | None, timing: Timing | None) -> None:
        """News of one sequence: `tokens` more of output, or the engine's final word."""
        key = (prompt, alternative)
        self._output[key] = usage.completion_tokens if usage is not None else self._output.get(key, 0) + tokens
        if usage is not None and alternative == 0:
            self._cached[prompt] = usage.cached_tokens
        if timing is not None:
            self._timings.append(timing)

    @property
    def completion_tokens(self) -> int:
        return sum(self._output.values())

    def usage(self) -> UsageReply:
        prompt, output = sum(self._prompt_tokens), self.completion_tokens
        return UsageReply(prompt, output, prompt + output, PromptDetails(sum(self._cached)))

    def timings(self) -> Timings:
        queued = [timing.queued_s for timing in self._timings]
        prefill = [timing.prefill_s for timing in self._timings if timing.prefill_s is not None]
        decode = [timing.decode_s for timing in self._timings if timing.decode_s is not None]
        slowest = max(decode, default=None)
        rate = self.completion_tokens / slowest if slowest else None
        return Timings(max(queued, default=None), max(prefill, default=None), slowest, rate)
