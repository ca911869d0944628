"""Virtual environments of peers: made once, outside our own, so that what we compare with never becomes a dependency.

Example: python -m bench.peers.environment --peer=llama_cpp   # prints the interpreter that has llama-cpp-python
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from absl import app, flags

from bench import common

FLAGS = flags.FLAGS

PACKAGES = {
    "transformers": ("torch==2.13.0", "transformers"),
    "llama_cpp": ("numpy", "gguf==0.19.0", "llama-cpp-python==0.3.36"),
}
_CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"
_PYTHONS = ("python3.11", "python3.12", "python3.13")


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    flags.DEFINE_string("peer_dir", ".cache/peers", "where environments of peers are kept")


def python_of(peer: str) -> Path:
    """The interpreter that has PACKAGES[peer]. Installs from the machine's package index on the first call; llama.cpp is
    compiled for this machine, which takes cmake, a C++ compiler and about ten minutes.

    Raises RuntimeError with the installer's last words when no Python here can install the packages.
    """
    directory = Path(FLAGS.peer_dir).resolve() / peer
    python, done = directory / "bin" / "python", directory / "installed"
    if done.exists():
        return python
    words = "no interpreter found"
    for base in filter(None, map(shutil.which, _PYTHONS)):
        common.say(f"installing {' '.join(PACKAGES[peer])} with {base}; once, some minutes")
        shutil.rmtree(directory, ignore_errors=True)
        steps = ([base, "-m", "venv", directory], [python, "-m", "pip", "install", "--quiet", *PACKAGES[peer]])
        for step in steps:
            result = subprocess.run(
                [str(part) for part in step], capture_output=True, text=True, env=os.environ | {"CMAKE_ARGS": _CMAKE_ARGS}
            )
            words = result.stderr[-500:]
            if result.returncode:
                break
        else:
            done.touch()
            return python
    raise RuntimeError(f"could not install {PACKAGES[peer]}: {words}")


def main(_: list[str]) -> int:
    try:
        print(python_of(FLAGS.peer))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_enum("peer", "transformers", list(PACKAGES), "whose environment")
    app.run(main)
