"""Owns the choice of a step's shapes: how many decode rows, and which prefill block. All sizes are those of one data partition;
every partition has the same.

Shapes come from a short table because every combination is compiled before the server says ready. `fixed` pins the table to
one decode size and one prefill shape that every step uses, whatever it holds: then chunk borders are multiples of C and an
answer's bits do not depend on who else is served.
"""

from collections.abc import Sequence

import msgspec

from novajax.core.errors import ConfigError


class Shapes(msgspec.Struct, frozen=True, kw_only=True):
    """The table. Raises ConfigError if it cannot always make progress inside `step_tokens`."""

    decode: tuple[int, ...]
    """Allowed S, ascending; a 0 lets steps without decode rows have no decode block."""
    prefill: tuple[tuple[int, int], ...]
    """Allowed (R, C)."""
    drafts: tuple[tuple[int, int], ...] = ()
    """(S, guesses of a row at most) of the steps that may have some, and no prefill block; ascending. None: there is no `speculation`."""
    score: tuple[int, int] | None = None
    """(R, C) of a step that scores a prompt, which holds one prefill row; None: prompts cannot be scored."""
    step_tokens: int
    """Most tokens in a partition's step, padding included: S + R * C."""
    step_cost_tokens: int = 64
    """What a step costs before its first token (reading the weights, the dispatch), in tokens of prefill."""
    fixed: bool = False

    def __post_init__(self) -> None:
        if not self.decode or list(self.decode) != sorted(set(self.decode)) or self.decode[0] < 0 or self.decode[-1] < 1:
            raise ConfigError(f"decode sizes must be ascending and end above 0, not {self.decode}")
        if not self.prefill or any(rows < 1 or chunk < 1 for rows, chunk in self.prefill + ((self.score,) if self.score else ())):
            raise ConfigError(f"prefill shapes must hold at least one row of one token, not {self.prefill} and {self.score}")
        smallest = min(rows * chunk for rows, chunk in self.prefill)
        if self.score is not None:
            smallest = max(smallest, self.score[0] * self.score[1])
        if self.decode[-1] + smallest > self.step_tokens:
            raise ConfigError(f"step_tokens={self.step_tokens} cannot hold {self.decode[-1]} decode rows and {smallest} prefill tokens")
        if self.fixed and (len(self.decode) != 1 or len(self.prefill) != 1 or self.score not in (None, self.prefill[0])):
            raise ConfigError(f"fixed shapes need exactly one of each, not {self.decode}, {self.prefill} and {self.score}")

    @property
    def max_decode_rows(self) -> int:
        return self.decode[-1]

    @property
    def max_prefill_rows(self) -> int:
        return max(rows for rows, _ in self.prefill)

    def decode_rows(self, rows: int) -> int:
        """The smallest allowed S that holds `rows`."""
        return next(size for size in self.decode if size >= rows)

    def drafting(self, rows: int) -> tuple[int, int]:
        """The smallest of `drafts` that holds `rows`; (0, 0): there is none."""
        return next((shape for shape in self.drafts if shape[0] >= rows), (0, 0))

    def prefill_shape(self, waiting_tokens: Sequence[Sequence[int]], decode_rows: int) -> tuple[int, int]:
        """The (R, C) for prompts that still have `waiting_tokens` beside a decode block of `decode_rows`.

        `waiting_tokens`: for each partition its prompts in order, none empty, at least one prompt in all. Most useful tokens per
        token of cost, where a step costs its padded size plus `step_cost_tokens`: a large block is taken when it can be filled, a
        small one rather than padding. Of equals the smaller block.
        """
        room = self.step_tokens - decode_rows

        def value(shape: tuple[int, int]) -> tuple[float, int]:
            rows, chunk = shape
            useful = sum(min(tokens, chunk) for prompts in waiting_tokens for tokens in prompts[:rows])
            return useful / (rows * chunk + self.step_cost_tokens), -rows * chunk

        return max((shape for shape in self.prefill if shape[0] * shape[1] <= room), key=value)

    def bubble(self) -> tuple[int, tuple[int, int] | None]:
        """The bucket of a plan without rows: the smallest there is."""
        return min(self.buckets(), key=lambda bucket: bucket[0] + (bucket[1][0] * bucket[1][1] if bucket[1] else 0))

    def buckets(self) -> list[tuple[int, tuple[int, int] | None]]:
        """Every (S, (R, C) or None) that a plan without guesses may have: what must be compiled before ready."""
        if self.fixed:
            return [(self.decode[0], self.prefill[0])]
        blocks = [*self.prefill, *((self.score,) if self.score and self.score not in self.prefill else ())]
        with_prefill: list[tuple[int, tuple[int, int] | None]] = [
            (size, block) for size in self.decode for block in blocks if size + block[0] * block[1] <= self.step_tokens
        ]
        return [(size, None) for size in self.decode if size] + with_prefill
