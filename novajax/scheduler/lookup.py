"""Guesses how a sequence goes on from its own tokens: what followed the last few tokens when they stood together before.

Prompt lookup, as in https://github.com/apoorvumang/prompt-lookup-decoding: answers quote, correct and repeat their prompts and themselves.
It costs no memory but four bytes a token and no time but a search through them.
"""

from array import array
from collections.abc import Sequence

NGRAM = 3
"""Tokens that must agree. Fewer find more places and wrong ones, more find quotations late."""
_WIDTH = array("i").itemsize


class Lookup:
    """Of one sequence, whose tokens only grow."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._after: int | None = None
        """The token that followed the last NGRAM tokens when they stood together before."""

    def guess(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """The `count` tokens that are likely to follow `tokens`, or none. A guess that reaches the end of what is known goes round."""
        known = len(self._bytes) // _WIDTH
        if known < len(tokens):
            self._bytes += array("i", tokens[known:]).tobytes()
            self._after = self._find(len(tokens))
        if self._after is None:
            return ()
        period = len(tokens) - self._after
        return tuple(tokens[self._after + i % period] for i in range(count))

    def _find(self, length: int) -> int | None:
        """Where the newest earlier occurrence of the last NGRAM tokens ends."""
        size = NGRAM * _WIDTH
        if length <= NGRAM:
            return None
        pattern, end = self._bytes[-size:], len(self._bytes) - 1
        while (at := self._bytes.rfind(pattern, 0, end)) >= 0:
            if at % _WIDTH == 0:
                return at // _WIDTH + NGRAM
            end = at + size - 1  # between two tokens
        return None
