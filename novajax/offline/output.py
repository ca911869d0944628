"""The output file of a batch: append-only JSON lines, the one truth about which input lines are finished.

Invariants: one process writes it (flock); every complete line is one record of this run, at most one per input line; a
record is one write, so `kill -9` leaves at most one cut line at the end, which the next start removes. Bytes are
handed to the kernel per record and forced to disk by `sync`: a power cut loses at most what came after the last sync.
Knows nothing of the requests behind the records.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from novajax.core.errors import ConfigError, Conflict
from novajax.offline.state import sync_directory

_CHUNK_BYTES = 2**20


class _Reply(msgspec.Struct):
    status_code: int


class _Head(msgspec.Struct):
    """The part of a record that recovery reads."""

    id: str
    line: int
    response: _Reply | None = None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code != 200


_HEADS = msgspec.json.Decoder(_Head)


class OutputStopped(Exception):
    """The disk refused a record; everything before it is intact and the same command resumes."""


class BatchOutput:
    """Open for appending, with what earlier runs finished already known."""

    def __init__(self, path: Path, run_id: str, lines: int, synced_bytes: int | None):
        """`synced_bytes`: how much of the file is known to have reached the disk (None: not known); only what lies beyond
        may be damaged, and is cut away.

        Raises Conflict when another process writes it or when it belongs to another input or model, ConfigError when it
        cannot be opened or holds anything but records: a file that is not ours is never cut.
        """
        path = path.resolve()
        self.path = path
        self.done = np.zeros(lines, bool)  # [lines]
        self.failed = 0
        self.run_id = run_id
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"output {path}: {error.strerror}", param="output") from error
        try:
            if not path.is_file():
                raise ConfigError(f"output {path} is not a regular file", param="output")
            self._lock()
            self._size_bytes = self._recover(synced_bytes)
            os.ftruncate(self._fd, self._size_bytes)
            sync_directory(path.parent)
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def record_id(self, number: int) -> str:
        return f"{self.run_id}_{number}"

    def append(self, number: int, record: bytes, *, failed: bool) -> None:
        """Writes one record (without its line end). Raises OutputStopped when the disk is full or refuses."""
        line = record + b"\n"
        written = 0
        try:
            while written < len(line):
                count = os.write(self._fd, line[written:])
                if count == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written += count
        except OSError as error:
            if written:
                os.ftruncate(self._fd, self._size_bytes)
            raise OutputStopped(f"cannot write to {self.path}: {error.strerror}; the same command resumes when there is room") from error
        self._size_bytes += len(line)
        self.done[number - 1] = True
        self.failed += failed

    def sync(self) -> None:
        """Forces every record so far to disk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise OutputStopped(f"cannot sync {self.path}: {error.strerror}") from error

    def sort_by_line(self) -> None:
        """Replaces the file, atomically, by the same records in the order of the input."""
        lengths = np.zeros(len(self.done), np.int64)
        starts = np.zeros(len(self.done), np.int64)
        for start, raw in _records(self._fd, self._size_bytes):
            at = _HEADS.decode(raw).line - 1
            starts[at], lengths[at] = start, len(raw)
        present = np.flatnonzero(lengths)
        if (np.diff(starts[present]) > 0).all():
            return
        fresh = self.path.with_name(self.path.name + ".sorted")
        try:
            with open(fresh, "wb") as file:
                for at in present:
                    file.write(os.pread(self._fd, int(lengths[at]), int(starts[at])))
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise OutputStopped(f"cannot sort {self.path}: {error.strerror}; its records are complete, in order of completion") from error
        sync_directory(self.path.parent)

    def close(self) -> None:
        """Also gives up the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"output {self.path} is being written by another process", param="output") from error
        if not os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
            raise Conflict(f"output {self.path} was replaced by another process just now", param="output")

    def _recover(self, synced_bytes: int | None) -> int:
        """Marks finished lines; returns how many bytes of the file are whole records."""
        good_bytes = 0
        opening = b'{"id":"%s_' % self.run_id.encode()
        for start, raw in _records(self._fd, os.fstat(self._fd).st_size):
            if not raw.endswith(b"\n") and (raw.startswith(opening) or opening.startswith(raw)):
                break  # a record cut by a kill
            try:
                head = _HEADS.decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError):
                if synced_bytes is not None and start >= synced_bytes:
                    break  # written after the last sync, damaged by a power cut
                raise ConfigError(f"output {self.path} byte {start}: not a record of a batch", param="output") from None
            run_id, _, number = head.id.rpartition("_")
            if run_id != self.run_id:
                raise Conflict(f"output {self.path} holds answers of another input or model", param="output")
            if number != str(head.line) or not 1 <= head.line <= len(self.done) or self.done[head.line - 1]:
                raise ConfigError(f"output {self.path} byte {start}: line {head.line} is repeated or out of range", param="output")
            self.done[head.line - 1] = True
            self.failed += head.failed
            good_bytes = start + len(raw)
        return good_bytes


def _records(fd: int, size_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(start, bytes with line end) of each line; the last may lack its line end."""
    start, held = 0, b""
    at = 0
    while at < size_bytes:
        chunk = os.pread(fd, min(_CHUNK_BYTES, size_bytes - at), at)
        if not chunk:
            break
        at += len(chunk)
        *whole, held = (held + chunk).split(b"\n")
        for line in whole:
            yield start, line + b"\n"
            start += len(line) + 1
    if held:
        yield start, held
