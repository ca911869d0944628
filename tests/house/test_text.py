"""The habits of the house that show in its text: small files, empty inits, module docstrings, nothing private or unfinished."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("novajax", "bench", "tests", "checkpoints")
LONGEST_FILE_LINES = 400
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "requirements.lock"}
TOP_LEVEL |= {"novajax", "configs", "checkpoints", "tests", "bench", "launch"}
# Joined from parts, so that this file passes its own check.
FORBIDDEN = {
    "a private path": re.compile(r"(?<![\w.~-])/" + r"(work|root|home|mnt)/"),
    "a package index": re.compile(r"--(extra-)?index" + r"-url|--find" + r"-links|--trusted" + r"-host", re.IGNORECASE),
    "a credential": re.compile(r"\b(sk|hf|ghp|xoxb)" + r"[-_][A-Za-z0-9]{20,}|-----BEGIN [A-Z ]*PRIVATE" + r" KEY"),
    "unfinished work": re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX|HA" + r"CK)\b"),
}


def tracked_files() -> list[Path]:
    """What git knows or would add, so that the check covers what is about to be committed."""
    ask = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip("not a git checkout")
    return sorted(path for name in done.stdout.splitlines() if (path := ROOT / name).is_file())


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders or FOLDERS for path in (ROOT / folder).rglob("*.py"))


def text_lines() -> Iterator[tuple[str, int, str]]:
    for path in tracked_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            yield str(path.relative_to(ROOT)), number, line


def test_python_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE_LINES}


def test_init_files_are_empty_but_the_top_one():
    inits = [path for path in python_files() if path.name == "__init__.py" and path.parent != ROOT / "novajax"]
    assert not [path for path in inits if path.read_text().strip()]


def test_modules_begin_with_a_docstring():
    modules = [path for path in python_files("novajax", "bench", "checkpoints") if path.name != "__init__.py"]
    assert modules
    assert not [path for path in modules if not ast.get_docstring(ast.parse(path.read_text()))]


def test_every_room_has_something_in_it():
    rooms = [path.parent for path in python_files("novajax") if path.name == "__init__.py"]
    assert not [room for room in rooms if not any(path.name not in ("__init__.py", "__pycache__") for path in room.iterdir())]


def test_test_files_have_names_of_their_own():
    """Two test files of one name cannot be collected together."""
    names = [path.name for path in python_files("tests") if path.name.startswith("test_")]
    assert not {name for name in names if names.count(name) > 1}


def test_tracked_text_is_clean():
    found = [
        f"{path}:{number}: {what}" for path, number, line in text_lines() for what, pattern in FORBIDDEN.items() if pattern.search(line)
    ]
    assert not found


def test_top_level_is_fixed():
    names = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
