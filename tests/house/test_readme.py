"""The README's commands exist, and so do their flags: every `python -m novajax.X --flag` in it is compared with X's own help."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = re.compile(r"python -m ((?:novajax|bench)(?:\.\w+)+)([^\n#]*)")
FLAG = re.compile(r"(?<!\S)--([a-z][a-z0-9_]*)")
ALWAYS = {"help", "helpfull", "helpshort"}
SHARED = ("novajax.options", "novajax.group")
DEFINES = re.compile(r"^DEFINE_\w+$")


def code_blocks(text: str) -> str:
    """The fenced blocks, with lines that end in a backslash joined."""
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")


def commands() -> list[tuple[str, tuple[str, ...]]]:
    found = COMMAND.findall(code_blocks((ROOT / "README.md").read_text()))
    return [(module, tuple(FLAG.findall(rest))) for module, rest in found]


def module_file(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def flag_names(path: Path) -> set[str]:
    """The absl flags that a file defines."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and DEFINES.match(call.func.attr)]
    return {call.args[0].value for call in named if call.args and isinstance(call.args[0], ast.Constant)}  # type: ignore[misc]


def known_flags(module: str) -> set[str]:
    """Those of the program and of the modules whose flags it shares."""
    path = module_file(module)
    text = path.read_text()
    shared = [name for name in SHARED if "define_engine_flags" in text]
    return flag_names(path).union(ALWAYS, *(flag_names(module_file(name)) for name in shared))


def test_the_readme_shows_commands():
    assert {module for module, _ in commands()} >= {"novajax.launch", "novajax.batch", "novajax.convert", "novajax.plan"}


@pytest.mark.parametrize(("module", "flags"), commands())
def test_a_shown_command_exists_with_its_flags(module, flags):
    assert module_file(module).is_file()
    assert set(flags) <= known_flags(module)


def test_flags_in_the_text_exist_somewhere():
    text = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    named = {flag for code in re.findall(r"`([^`\n]+)`", text) if not code.startswith("pip ") for flag in FLAG.findall(code)}
    programs = [*(ROOT / "novajax").glob("*.py"), *(ROOT / "bench").glob("*.py")]
    assert named <= ALWAYS.union(*(flag_names(path) for path in programs))


def test_shown_make_targets_and_files_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^make ([a-z-]+)", code_blocks(text), re.MULTILINE)) | set(re.findall(r"`make ([a-z-]+)`", text))
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= made
    files = {word for word in re.findall(r"(?:configs|checkpoints|launch|bench)/[\w.-]*\w", text)}
    assert not [name for name in files if not (ROOT / name).exists()]
