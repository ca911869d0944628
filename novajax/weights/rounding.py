"""What is lost where a checkpoint that others quantized does not fit one of our formats and is rounded again."""

import threading

import msgspec
import numpy as np


class Requantized(msgspec.Struct, frozen=True):
    """Of the matrices of a checkpoint that others quantized. Errors are relative: mean square of the change over the weight's, rooted."""

    kept: float
    """Share of the numbers that are held exactly as they were stored."""
    error: float
    """Of all of them together."""
    worst: str
    """The parameter that changed most; empty: none did."""
    worst_error: float

    def __str__(self) -> str:
        changed = f", worst {self.worst} {self.worst_error:.3%}" if self.worst else ""
        return f"{self.kept:.1%} of the quantized numbers kept as they were; relative error {self.error:.3%}{changed}"


class Rounding:
    """Adds up changes, piece by piece; several threads may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, np.ndarray] = {}

    def met(self, name: str, exact: np.ndarray, held: np.ndarray | None) -> None:
        """A piece of a parameter in float32, and what it was rounded to; None: it was kept."""
        change = 0.0 if held is None else float(np.sum(np.square(held - exact), dtype=np.float64))
        square = float(np.sum(np.square(exact), dtype=np.float64))
        with self._lock:
            found = self._sums.setdefault(name, np.zeros(4))
            found += (exact.size, exact.size if held is None else 0, change, square)

    def result(self) -> Requantized | None:
        """Of all pieces; None where there were none."""
        if not self._sums:
            return None
        numbers, kept, change, square = np.sum(list(self._sums.values()), axis=0)
        errors = {name: _relative(change, square) for name, (_, _, change, square) in self._sums.items()}
        worst = max(errors, key=errors.__getitem__)
        changed = errors[worst] > 0
        return Requantized(float(kept / numbers), _relative(change, square), worst if changed else "", errors[worst])


def _relative(change: float, square: float) -> float:
    return float(np.sqrt(change / square)) if square else 0.0
