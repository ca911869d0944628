"""Keeps the text of control tokens that stands in users' strings apart from the control tokens a template writes.

A private-use character, the guard, is put into users' strings before the template sees them, wherever a control token
stands (in any case of letters) or could arise across the string's border. `Tokenizer.encode(guard=...)` then finds only the
template's own control tokens and deletes the guard. Trimming, slicing and case filters of templates do not undo it.
Ordinary strings need no guard and stay as they are.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

from novajax.core.errors import InvalidRequest

_GUARDS = range(0xF0000, 0xFFFFE)
"""Plane 15, private use."""


def any_of(words: Collection[str], *, flags: int = 0) -> re.Pattern[str]:
    """A pattern for any of the words, the longest that fits first, in time independent of how many there are."""
    return re.compile(_branches(sorted(set(words))) if words else r"(?!)", flags)


def _branches(words: list[str]) -> str:
    """Words that share a first character share a branch, recursively."""
    groups: dict[str, list[str]] = {}
    for word in words:
        if word:
            groups.setdefault(word[0], []).append(word[1:])
    choices = [re.escape(first) + _branches(rest) for first, rest in groups.items()]
    if not choices:
        return ""
    joined = choices[0] if len(choices) == 1 and "" not in words else f"(?:{'|'.join(choices)})"
    return joined + "?" if "" in words else joined


def map_strings(value: Any, change: Callable[[str], str], skip: Collection[str] = ()) -> Any:
    """A copy of a JSON value with every string and key changed, except the values under the keys in `skip`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(k): v if k in skip else map_strings(v, change, skip) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(item, change, skip) for item in value]
    return value


class Guard:
    """Knows the control tokens of one tokenizer."""

    def __init__(self, control_tokens: Collection[str]):
        lowered = [token.lower() for token in control_tokens]
        self._token = any_of(control_tokens, flags=re.IGNORECASE)
        self._starts = {token[:length] for token in lowered for length in range(1, len(token))}
        self._ends = {token[length:] for token in lowered for length in range(1, len(token))}
        self._longest = max(map(len, lowered), default=0)

    def protect(self, value: Any, skip: Collection[str] = (), avoid: str = "") -> tuple[Any, str]:
        """(the JSON value with guards where needed, the guard character or "" if none was needed).

        avoid: text that must not hold the guard. Raises InvalidRequest if the strings use up the whole private plane.
        """
        needed, used = False, set(avoid)

        def look(text: str) -> str:
            nonlocal needed
            needed = needed or self._needs(text)
            if not text.isascii():
                used.update(text)
            return text

        map_strings(value, look, skip)
        if not needed:
            return value, ""
        guard = unused_character(used)
        return map_strings(value, lambda text: self._broken(text, guard), skip), guard

    def _needs(self, text: str) -> bool:
        return self._opens(text) or self._closes(text) or self._token.search(text) is not None

    def _opens(self, text: str) -> bool:
        """The text ends like the beginning of a control token."""
        tail = text[-self._longest :].lower() if self._longest else ""
        return any(tail[-length:] in self._starts for length in range(1, len(tail) + 1))

    def _closes(self, text: str) -> bool:
        """The text begins like the end of a control token."""
        head = text[: self._longest].lower()
        return any(head[:length] in self._ends for length in range(1, len(head) + 1))

    def _broken(self, text: str, guard: str) -> str:
        before, after = guard if self._closes(text) else "", guard if self._opens(text) else ""
        while self._token.search(text):
            text = self._token.sub(lambda match: match[0][0] + guard + match[0][1:], text)
        return before + text + after


def unused_character(used: Collection[str]) -> str:
    """A private-use character that is not in `used`; InvalidRequest if there is none."""
    for code in _GUARDS:
        if chr(code) not in used:
            return chr(code)
    raise InvalidRequest("the text uses every private-use character", param="messages")
