"""Virtual environments of peers: made once, outside our own, so that what we compare with never becomes a dependency.

Example: python -m bench.peers.environment   # prints the interpreter that has torch and transformers
"""

import shutil
import subprocess
import sys
from pathlib import Path

from absl import app, flags

from bench import common

FLAGS = flags.FLAGS

TRANSFORMERS_PACKAGES = ("torch==2.13.0", "transformers")
_PYTHONS = ("python3.11", "python3.12", "python3.13")


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    flags.DEFINE_string("peer_dir", ".cache/peers", "where environments of peers are kept")
    flags.DEFINE_string("peer_python", None, "an interpreter that already has torch and transformers; nothing is installed then")


def transformers_python() -> Path:
    """The interpreter to run `transformers_cpu.py` with. Installs from the machine's package index on the first call.

    Raises RuntimeError with the installer's last words when no Python here can install the packages.
    """
    if FLAGS.peer_python:
        return Path(FLAGS.peer_python)
    directory = Path(FLAGS.peer_dir).resolve() / "transformers"
    python, done = directory / "bin" / "python", directory / "installed"
    if done.exists():
        return python
    words = "no interpreter found"
    for base in filter(None, map(shutil.which, _PYTHONS)):
        common.say(f"installing {' '.join(TRANSFORMERS_PACKAGES)} with {base}; once, some minutes")
        shutil.rmtree(directory, ignore_errors=True)
        steps = ([base, "-m", "venv", directory], [python, "-m", "pip", "install", "--quiet", *TRANSFORMERS_PACKAGES])
        for step in steps:
            result = subprocess.run([str(part) for part in step], capture_output=True, text=True)
            words = result.stderr[-500:]
            if result.returncode:
                break
        else:
            done.touch()
            return python
    raise RuntimeError(f"could not install {TRANSFORMERS_PACKAGES}: {words}")


def main(_: list[str]) -> int:
    try:
        print(transformers_python())
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
