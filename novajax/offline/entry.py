"""One input line as a request: OpenAI's batch form, or a plain body; or the reason why it is neither.

Pure: bytes in, value out. What is inside the body is not looked at here; messages never quote the line.
"""

from typing import Any

import msgspec

from novajax.offline.index import Line, LineIndex

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
URLS = (CHAT_URL, COMPLETIONS_URL)
_LONGEST_ID = 512
"""Characters of a custom_id."""


class Entry(msgspec.Struct, frozen=True):
    """A line that asks for something. `body` is the JSON text of the request itself."""

    number: int
    custom_id: str | None
    url: str
    body: bytes


class BadLine(Exception):
    """A line that cannot become a request; `code` is the stable name, the message begins with the line's number."""

    def __init__(self, number: int, custom_id: str | None, code: str, reason: str):
        super().__init__(f"line {number}: {reason}")
        self.number = number
        self.custom_id = custom_id
        self.code = code
        self.message = f"line {number}: {reason}"


_ABSENT = msgspec.Raw()


class _Fields(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = _ABSENT
    prompt: msgspec.Raw = _ABSENT
    messages: msgspec.Raw = _ABSENT


_FIELDS = msgspec.json.Decoder(_Fields)


def read_entry(line: Line, index: LineIndex) -> Entry:
    """The request on this line. Raises BadLine."""
    fields = _decode(line)
    custom_id = fields.custom_id
    if custom_id is not None and not (isinstance(custom_id, str) and 0 < len(custom_id) <= _LONGEST_ID):
        raise BadLine(line.number, None, "invalid_custom_id", f"custom_id must be a string of 1 to {_LONGEST_ID} characters")
    url, body = _request(line, fields)
    if custom_id is not None:
        earlier = index.earlier_line_with_id(line.number, custom_id)
        if earlier is not None:
            raise BadLine(line.number, custom_id, "duplicate_custom_id", f"its custom_id is that of line {earlier}")
    return Entry(line.number, custom_id, url, body)


def _decode(line: Line) -> _Fields:
    number = line.number
    if line.data is None:
        raise BadLine(number, None, "line_too_long", f"{line.size_bytes} bytes are more than one line may have")
    if not line.data.strip():
        raise BadLine(number, None, "empty_line", "it is empty")
    try:
        line.data.decode()
    except UnicodeDecodeError as error:
        raise BadLine(number, None, "invalid_utf8", f"byte {error.start + 1} is not UTF-8") from None
    try:
        return _FIELDS.decode(line.data)
    except RecursionError:
        raise BadLine(number, None, "invalid_json", "it is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise BadLine(number, None, "invalid_line", f"it is not a request: {error}") from None
    except msgspec.DecodeError as error:
        raise BadLine(number, None, "invalid_json", f"it is not JSON: {error}") from None


def _request(line: Line, fields: _Fields) -> tuple[str, bytes]:
    """(url, body) of the batch form, or of a plain object with `prompt` or `messages`."""
    custom_id, whole = fields.custom_id, line.data or b""
    if fields.url is None and fields.method is None and fields.body is _ABSENT:
        if (fields.prompt is _ABSENT) == (fields.messages is _ABSENT):
            raise BadLine(line.number, custom_id, "invalid_line", "it has neither url, method and body, nor one of prompt and messages")
        return (COMPLETIONS_URL if fields.messages is _ABSENT else CHAT_URL), whole
    if custom_id is None:
        raise BadLine(line.number, None, "missing_custom_id", "a line in batch form needs a custom_id")
    if fields.method != "POST":
        raise BadLine(line.number, custom_id, "invalid_method", "method must be POST")
    if fields.url not in URLS:
        raise BadLine(line.number, custom_id, "invalid_url", f"url must be one of {', '.join(URLS)}")
    if fields.body is _ABSENT:
        raise BadLine(line.number, custom_id, "missing_body", "it has no body")
    return fields.url, bytes(fields.body)
