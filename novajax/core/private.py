"""Folders that hold code: what is loaded from one runs, so it must belong to this user and be writable by nobody else."""

import os
import stat
from pathlib import Path

import structlog


def is_private(directory: Path) -> bool:
    """Whether code may be kept in the folder, which is made if it is not there; says so in the log if not."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    private = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not private:
        structlog.get_logger().warning("no code is kept in a folder where others may write", directory=str(directory))
    return private
