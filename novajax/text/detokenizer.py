"""Token ids to text while they are being generated: whole characters only, each token looked at once.

Invariant: the concatenation of everything pushed and flushed equals `Tokenizer.decode` of all ids. A character whose
bytes are spread over several tokens comes out with the token that completes it; U+FFFD appears only where the bytes
can no longer become a character. It knows nothing of stop strings.
"""

import codecs
from collections.abc import Sequence

from novajax.text.tokenizer import Tokenizer
from novajax.text.vocabulary import strip_lead

_LONGEST_CHARACTER_BYTES = 4


class Detokenizer:
    """One sequence's decoder. `prompt_ids` come before the first pushed id: they decide whether a sentencepiece leading
    space is dropped, and may end in the middle of a character."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        visible = any(tokenizer.token_bytes(token, skip_special) for token in prompt_ids)
        self._lead = 0 if visible else tokenizer.lead
        for token in prompt_ids[-_LONGEST_CHARACTER_BYTES:]:
            self._utf8.decode(tokenizer.token_bytes(token, skip_special))

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is still open."""
        data = self._tokenizer.token_bytes(token, self._skip_special)
        if self._lead and data:
            data, self._lead = strip_lead(data, self._lead)
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end of the text: U+FFFD where a character was left open, else empty."""
        return self._utf8.decode(b"", True)
