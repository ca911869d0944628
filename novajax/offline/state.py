"""What a batch run remembers beside its output: whose output it is, and where reading may start again.

The output file is the truth; this is only a fast-forward and the text of a refusal. Losing it costs time, never lines.
"""

import os
from pathlib import Path

import msgspec

_VERSION = 1


class BatchState(msgspec.Struct, frozen=True, kw_only=True):
    """Written after the output's bytes are on disk, so `synced_bytes` of the output survive a power cut."""

    run_id: str
    input_sha256: str
    input_bytes: int
    weights_digest: str
    synced_bytes: int
    first_open_line: int
    """Every line before this one is finished (numbers count from 1)."""
    iterator: dict
    """The grain iterator's own state, from which the next element is `first_open_line`."""
    version: int = _VERSION


def state_path(output: Path) -> Path:
    return output.with_name(output.name + ".state")


def load_state(path: Path) -> BatchState | None:
    """None when there is none, or none that can be read."""
    try:
        state = msgspec.json.decode(path.read_bytes(), type=BatchState)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return state if state.version == _VERSION else None


def save_state(path: Path, state: BatchState) -> None:
    """Atomic: a reader sees the old state or the new one. Raises OSError."""
    fresh = path.with_name(path.name + ".new")
    with open(fresh, "wb") as file:
        file.write(msgspec.json.encode(state))
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes a rename or a new file in `directory` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
