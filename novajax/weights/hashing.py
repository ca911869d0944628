"""SHA-256 of whole files, many at a time, beside other work.

Invariants: files are read once, in order, in small blocks (which also brings them into the page cache for whoever reads
slices of them at the same time); nothing is held. hashlib frees the interpreter while it works.
"""

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from novajax.core.errors import WeightsError

BLOCK_BYTES = 4 << 20
MAX_THREADS = 8


class FileHashes:
    """Starts hashing `paths` in the order given; `wait` gives one file's result. Close it to stop."""

    def __init__(self, paths: Iterable[Path]):
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)))), thread_name_prefix="sha256")
        self._results: dict[Path, Future[str]] = {path: self._pool.submit(sha256_file, path, self._stop) for path in paths}

    def wait(self, path: Path) -> str:
        """The hex digest of one of the paths. Raises WeightsError when it cannot be read."""
        return self._results[path].result()

    def close(self) -> None:
        """Stops what is not done yet. May be called twice."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "FileHashes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sha256_file(path: Path, stop: threading.Event | None = None) -> str:
    """The hex digest of a file's bytes; ends early, with a useless digest, once `stop` is set. Raises WeightsError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while (got := file.readinto(buffer)) and not (stop and stop.is_set()):
                digest.update(buffer[:got])
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from None
    return digest.hexdigest()
