"""Stop strings: finds them in text that arrives in pieces, across token borders.

Invariants: what comes out does not depend on how the text was cut; no character of a stop string leaves before it is
sure that the stop string is not there; each push costs its own length plus the longest stop string. It knows nothing
of tokens.
"""

from collections.abc import Sequence

from novajax.core.errors import InvalidRequest

MAX_STOPS = 4
MAX_STOP_BYTES = 256


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings of one request, or InvalidRequest: at most MAX_STOPS, none empty, each at most MAX_STOP_BYTES in UTF-8."""
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"{len(stops)} stop strings; at most {MAX_STOPS} are served", param="stop")
    for number, stop in enumerate(stops):
        if not stop:
            raise InvalidRequest(f"stop string {number} is empty", param="stop")
        size_bytes = len(stop.encode("utf-8", "surrogatepass"))
        if size_bytes > MAX_STOP_BYTES:
            raise InvalidRequest(f"stop string {number} has {size_bytes} bytes; at most {MAX_STOP_BYTES} are served", param="stop")
    return tuple(stops)


class StopFinder:
    """Feeds text through and cuts it at the first stop string to be complete (of several ending there, the longest)."""

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        """`include`: the stop string itself is part of the text that comes out."""
        self._stops = tuple(stops)
        self._include = include
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is now certain, the stop string found or None). After a stop string was found the rest is dropped."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, at, stop = min(found)
            self._held = ""
            return text[: end if self._include else at], stop
        held = self._possible_start(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def unsearched(self, text: str) -> str:
        """Passes text that may not stop anything (before min_tokens); it cannot be part of a stop string either."""
        text, self._held = self._held + text, ""
        return text

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self.unsearched("")

    def _possible_start(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
