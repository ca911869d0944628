"""How well a sequence's guesses did lately, and what to expect of the next ones."""

import msgspec

KEPT = 0.9
"""Weight of the past at each new result: about the last ten steps with guesses count."""
FADING = 0.99
"""Weight of the past at each step that was not worth guessing: after some hundreds a sequence gets another chance."""
PRIOR = 1.0
"""Right and wrong guesses each that a new sequence is taken to have made."""


class Record(msgspec.Struct):
    """Decayed counts of the guesses that were checked: those behind the first wrong one never are."""

    right: float = 0.0
    wrong: float = 0.0

    def landed(self, drafted: int, accepted: int) -> None:
        """Of `drafted` guesses in a row the first `accepted` were right."""
        self.right = KEPT * self.right + accepted
        self.wrong = KEPT * self.wrong + (accepted < drafted)

    def fade(self) -> None:
        self.right *= FADING
        self.wrong *= FADING

    def expected(self, drafted: int) -> float:
        """How many of `drafted` guesses are likely to prove right: a + a^2 + ... if each does with probability a (Leviathan et al.,
        arXiv 2211.17192, 3.1)."""
        a = (self.right + PRIOR) / (self.right + self.wrong + 2 * PRIOR)
        return drafted if a == 1.0 else a * (1 - a**drafted) / (1 - a)
