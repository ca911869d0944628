"""Random access to the lines of a batch input that may not fit in memory, and the identity of that input.

Owns one open file and 8 bytes per line (about 35 while it is built: 10 million lines need 80 MB, 350 MB at the peak). Invariants:
line i is the bytes [starts[i], starts[i + 1]) without its line end; no read asks for more than `max_line_bytes`;
the digest covers every byte. Knows nothing of what the lines mean beyond the name of their `custom_id` field.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from novajax.core.errors import ConfigError

_CHUNK_BYTES = 4 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(msgspec.Struct, frozen=True):
    """One input line. `data` is None when it is longer than the cap: then only its length is known."""

    number: int
    """Counted from 1, as editors do."""
    data: bytes | None
    size_bytes: int


class _Named(msgspec.Struct):
    custom_id: str | None = None


_NAMED = msgspec.json.Decoder(_Named)


class LineIndex:
    """`lines[i]` is the Line number i + 1. Safe to read from several threads (pread only)."""

    def __init__(self, path: Path, max_line_bytes: int, on_bytes: Callable[[int], None] = lambda _: None):
        """Reads the whole file once for its digest and line starts, and its ids once. `on_bytes` hears of progress.

        Raises ConfigError when the file cannot be read as a regular file.
        """
        self.path = path
        self._max_line_bytes = max_line_bytes
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"input {path}: {error.strerror}", param="input") from error
        try:
            if not os.path.isfile(path):
                raise ConfigError(f"input {path} is not a regular file: it must be readable twice", param="input")
            self._stamp = self._stat()
            self._starts, self.sha256 = self._scan(on_bytes)
            self._repeats, self._firsts = self._find_repeats()
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        return int(self._starts[-1])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Line:
        start, size_bytes = int(self._starts[index]), int(self._starts[index + 1] - self._starts[index])
        if size_bytes > self._max_line_bytes:
            return Line(index + 1, None, size_bytes)
        data = os.pread(self._fd, size_bytes, start)
        if index == 0:
            data = data.removeprefix(_BYTE_ORDER_MARK)
        return Line(index + 1, data.rstrip(b"\r\n"), size_bytes)

    def earlier_line_with_id(self, number: int, custom_id: str) -> int | None:
        """Number of the first line that carries the custom_id of line `number`, if it is not that line itself."""
        at = int(np.searchsorted(self._repeats, number - 1))
        if at == len(self._repeats) or self._repeats[at] != number - 1:
            return None
        first = int(self._firsts[at])
        return first + 1 if _custom_id(self[first].data) == custom_id else None

    def changed(self) -> bool:
        """True when the file was written to or replaced in place since it was opened."""
        return self._stat() != self._stamp

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self._fd)
        return stat.st_size, stat.st_mtime_ns

    def _scan(self, on_bytes: Callable[[int], None]) -> tuple[np.ndarray, str]:
        digest, size_bytes = hashlib.sha256(), 0
        ends = [np.zeros(1, np.int64)]
        while chunk := os.pread(self._fd, _CHUNK_BYTES, size_bytes):
            digest.update(chunk)
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (size_bytes + 1))
            size_bytes += len(chunk)
            on_bytes(len(chunk))
        starts = np.concatenate(ends)
        if starts[-1] != size_bytes:
            starts = np.append(starts, size_bytes)  # the last line has no line end
        return starts, digest.hexdigest()

    def _find_repeats(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted indices of lines whose id was seen before, and the index of the first line with that id."""
        hashes = np.zeros(len(self), np.uint64)
        for i in range(len(self)):
            custom_id = _custom_id(self[i].data)
            if custom_id is not None:
                hashes[i] = int.from_bytes(hashlib.blake2b(custom_id.encode(), digest_size=8).digest())
        order = np.argsort(hashes, kind="stable")
        ranked = hashes[order]
        del hashes
        at = np.flatnonzero((ranked[1:] == ranked[:-1]) & (ranked[1:] != 0)) + 1
        lines, firsts = order[at], order[np.searchsorted(ranked, ranked[at])]
        by_line = np.argsort(lines)
        return lines[by_line], firsts[by_line]


def _custom_id(data: bytes | None) -> str | None:
    if data is None:
        return None
    try:
        return _NAMED.decode(data).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
