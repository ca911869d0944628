"""Loading: GB/s from a Hugging Face directory and from a sealed one, beside what the disk and the page cache give.

Without --model, a random 1.1B Llama checkpoint is made (bfloat16, 2.2 GB in shards). Each load runs in a
process of its own, which polls its anonymous memory (RssAnon) all the while: the peak, less what was there before and the
arrays themselves, is the cost of loading. Bytes are those stored; cold means that the files were dropped from the
page cache first (fadvise), warm that they are in it. Limits are measured in the same run by plain reads of the same files.

Examples:
  python -m bench.load
  python -m bench.load --model=DIR --dtype=bfloat16 --nosealed --json
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
from absl import app, flags

from bench import common

_ROOT = Path(__file__).resolve().parent.parent
_READ_BYTES = 8 << 20
HEADER = ("what", "GB/s", "of a plain read", "s", "CPU s", "MB over the arrays")

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    flags.adopt_module_key_flags(common)
    flags.DEFINE_string("model", None, "a Hugging Face directory; else a random one is made")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "type to load into")
    flags.DEFINE_bool("sealed", True, "also seal the model beside it (in --dtype) and load that")
    flags.DEFINE_integer("repetitions", 3, "warm loads; the median is reported", lower_bound=1)
    flags.DEFINE_string("child", None, "internal: load this directory once and print what it took")
    flags.DEFINE_bool("verify", True, "internal: hash the files beside the load")


class Loaded(msgspec.Struct, frozen=True):
    """What one load took."""

    seconds: float
    cpu_s: float
    """Of all threads, in user code and the kernel: what other work on the machine changes least."""
    array_bytes: int
    before_anonymous_bytes: int
    peak_anonymous_bytes: int

    @property
    def over_bytes(self) -> int:
        """Anonymous memory at the peak beyond the arrays and what the process had before."""
        return self.peak_anonymous_bytes - self.before_anonymous_bytes - self.array_bytes


def anonymous_bytes() -> int:
    """RssAnon of this process (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class PeakMeter:
    """The largest RssAnon between enter and exit, polled every few milliseconds."""

    def __enter__(self) -> "PeakMeter":
        self.before_bytes = self.peak_bytes = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def _poll(self) -> None:
        while not self._stop.wait(0.003):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def load_once(directory: str, dtype: str, verify: bool) -> Loaded:
    """In the child: one load onto the first device."""
    import jax

    from novajax.parallel.mesh import make_mesh
    from novajax.telemetry.progress import Silent
    from novajax.weights.load import describe, load_model

    mesh = make_mesh(devices=jax.devices()[:1])
    description = describe(directory)
    if description.manifest is not None:
        import orbax.checkpoint  # noqa: F401  its import is a cost of the start, not of the load
    begun_cpu_s = time.process_time()
    with PeakMeter() as meter:
        loaded = load_model(description, mesh, dtype, progress=Silent, verify=verify)
    return Loaded(loaded.seconds, time.process_time() - begun_cpu_s, loaded.bytes, meter.before_bytes, meter.peak_bytes)


def in_child(directory: Path, *, verify: bool) -> Loaded:
    command = [sys.executable, "-m", "bench.load", f"--child={directory}", f"--dtype={FLAGS.dtype}", f"--verify={verify}"]
    done = subprocess.run(command, capture_output=True, cwd=_ROOT, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"loading {directory} failed: {done.stderr.decode()[-800:]}")
    return msgspec.json.decode(done.stdout, type=Loaded)


def weight_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size >= 1 << 16)


def drop_from_cache(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(files: list[Path]) -> float:
    """Bytes per second of plain reads, one file after the other, one thread."""
    buffer = memoryview(bytearray(_READ_BYTES))
    total_bytes, begun_s = 0, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                total_bytes += got
    return total_bytes / (time.perf_counter() - begun_s)


def measure(name: str, directory: Path) -> list[list[Any]]:
    """Rows as `HEADER` names them of one directory."""
    files = weight_files(directory)
    stored_bytes = sum(path.stat().st_size for path in files)
    drop_from_cache(files)
    cold_read = read_rate(files)
    drop_from_cache(files)
    cold = in_child(directory, verify=True)
    warm_read = read_rate(files)
    rows = [[f"{name}, plain read, cold", cold_read / 1e9, 1.0, stored_bytes / cold_read, None, None]]
    rows.append(_row(f"{name}, load, cold", stored_bytes, cold, cold_read))
    rows.append([f"{name}, plain read, warm", warm_read / 1e9, 1.0, stored_bytes / warm_read, None, None])
    for verify in (True, False):
        runs = sorted((in_child(directory, verify=verify) for _ in range(FLAGS.repetitions)), key=lambda run: run.seconds)
        what = f"{name}, load, warm" + ("" if verify else ", without sha256")
        worst = max(runs, key=lambda run: run.over_bytes)
        rows.append(_row(what, stored_bytes, runs[len(runs) // 2], warm_read, worst.over_bytes))
    return rows


def _row(name: str, stored_bytes: int, run: Loaded, read_bytes_per_s: float, over_bytes: int | None = None) -> list[Any]:
    rate = stored_bytes / run.seconds
    over = run.over_bytes if over_bytes is None else over_bytes
    return [name, rate / 1e9, rate / read_bytes_per_s, run.seconds, run.cpu_s, over / 1e6]


def main(_: list[str]) -> int:
    if FLAGS.child:
        sys.stdout.buffer.write(msgspec.json.encode(load_once(FLAGS.child, FLAGS.dtype, FLAGS.verify)))
        return 0
    machine = common.describe_machine(probe=FLAGS.probe)
    model = Path(FLAGS.model).resolve() if FLAGS.model else _make()
    rows = measure("safetensors", model)
    if FLAGS.sealed:
        with tempfile.TemporaryDirectory(dir=model.parent) as folder:
            sealed = Path(folder) / "sealed"
            command = [sys.executable, "-m", "novajax.convert", f"--model={model}", f"--output={sealed}"]
            command += [f"--dtype={FLAGS.dtype}", "--quiet"]
            subprocess.run(command, check=True, cwd=_ROOT, timeout=1800)
            rows += measure(f"sealed {FLAGS.dtype}", sealed)
    results = [dict(zip(HEADER, row, strict=True)) for row in rows]
    report = {"benchmark": "load", "machine": machine, "settings": common.settings(__name__), "results": results}
    common.publish(report, f"{common.markdown_table(HEADER, rows)}\n\n{common.machine_line(machine)}; into {FLAGS.dtype}\n")
    return 0


def _make() -> Path:
    """In a process of its own, so that the shards' memory is not this process's."""
    command = [sys.executable, "-m", "bench.shapes", "--shape=1.1b", "--weights_dtype=bfloat16", "--shard_mib=512"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=_ROOT, timeout=1800)
    return (_ROOT / done.stdout.strip()).resolve()


if __name__ == "__main__":
    define_flags()
    app.run(main)
