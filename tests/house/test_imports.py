"""Imports point one way, host rooms start without jax, only entry points read the environment, nothing unpickles but the
kept programs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "novajax"
HOST_ROOMS = ("core", "planner", "scheduler", "text", "server", "telemetry", "cluster")
HOST_FILES = ("kv/pages.py", "kv/prefix.py", "kv/manager.py")
ENTRY_POINTS = ("launch.py", "precompile.py", "worker.py", "supervise.py", "batch.py", "convert.py", "train.py", "options.py")
SHELF = PACKAGE / "engine" / "shelf.py"
"""It keeps machine code in a folder that only this user may write: what could forge a pickle there could forge the code in it. XLA_FLAGS
are an input of the compiler, so they are part of a program's name."""
UNPICKLERS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in ("environ", "getenv") for alias in node.names)
    return isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and getattr(node.value, "id", None) == "os"


def test_only_entry_points_and_bootstrap_read_the_environment():
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "bootstrap.py" and path != SHELF]
    files = [path for path in files if path.parent != PACKAGE or path.name not in ENTRY_POINTS]
    assert not [path for path in files if any(reads_environment(node) for node in nodes(path))]


def test_nothing_unpickles_but_kept_programs():
    users = {path for path in PACKAGE.rglob("*.py") for node in nodes(path) for name in imported(node) if name.split(".")[0] in UNPICKLERS}
    assert users == {SHELF}


def test_only_the_package_imports_itself_absolutely():
    """Relative imports would hide the direction from a reader."""
    relative = [path for path in PACKAGE.rglob("*.py") for node in nodes(path) if isinstance(node, ast.ImportFrom) and node.level]
    assert not relative


def test_import_contracts_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([str(lint), "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_host_rooms_start_without_jax():
    """Not even indirectly: a gateway must start on a machine that has no accelerator and no jax."""
    files = [path for room in HOST_ROOMS for path in sorted((PACKAGE / room).glob("*.py"))]
    files += [PACKAGE / name for name in HOST_FILES if (PACKAGE / name).exists()]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if path.name not in ("__init__.py", "bootstrap.py")]
    script = [
        "import importlib, sys",
        f"for name in {modules!r}:",
        "    importlib.import_module(name)",
        "    heavy = {'jax', 'jaxlib', 'flax', 'optax', 'orbax'} & set(sys.modules)",
        "    if heavy: sys.exit(f'{name} imports {sorted(heavy)}')",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert modules
    assert done.returncode == 0, done.stderr
