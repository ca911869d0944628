"""NovaJAX beside other engines on the same checkpoint, same lengths, same machine, interleaved in one run.

Each round measures every side once, in a process of its own that ends before the next begins, so that a change of the
machine's load meets all. Reported: the median of the rounds of each side, what that says about the machine (weights' bytes
read and multiplied, as a share of the memory rate measured before), and NovaJAX's ratio to each peer of as many bits a
weight. The peers' batch is one static batch of sequences; ours is that many requests through the scheduler, without guesses
of next tokens: random weights repeat themselves, and no peer guesses. A peer that cannot be installed is left out with a word.

Examples:
  python -m bench.compare --shape=135m --rounds=5
  python -m bench.compare --weights_dtype=bfloat16 --novajax=bfloat16,int8 --peers=llama_cpp-bf16,llama_cpp-q8_0 --out=/tmp/compare
"""

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
from absl import app, flags

from bench import common, shapes
from bench.peers import environment

FLAGS = flags.FLAGS

_ROOT = Path(__file__).resolve().parent.parent
_FIGURES = ("output_tokens_per_s", "decode_tokens_per_s")
_WEIGHT_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
_PEERS = {
    "transformers-float32": ("transformers", "float32", 32.0),
    "transformers-bfloat16": ("transformers", "bfloat16", 16.0),
    "llama_cpp-f32": ("llama_cpp", "f32", 32.0),
    "llama_cpp-bf16": ("llama_cpp", "bf16", 16.0),
    "llama_cpp-q8_0": ("llama_cpp", "q8_0", 8.5),
    "llama_cpp-q4_0": ("llama_cpp", "q4_0", 4.5),
}


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    shapes.define_flags()
    environment.define_flags()
    for module in (common, shapes, environment):
        flags.adopt_module_key_flags(module)
    flags.DEFINE_string("model", None, "a Hugging Face directory; else the checkpoint of --shape is made")
    flags.DEFINE_integer("rounds", 5, "how often each is measured, in turn", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 128, "prompt length", lower_bound=1)
    flags.DEFINE_integer("output_tokens", 128, "answer length", lower_bound=2)
    flags.DEFINE_list("batch_sizes", ["1", "16"], "sequences at once")
    flags.DEFINE_list("novajax", ["float32"], f"our sides, by their weights: {', '.join(_WEIGHT_BITS)}")
    flags.DEFINE_list("peers", ["transformers-float32"], f"the others: {', '.join(_PEERS)}")
    flags.DEFINE_string("engine_flags", "", "more flags for each of our sides, like '--kv_cache_dtype=int8'")
    flags.DEFINE_float("timeout_s", 1800.0, "most seconds for one measurement")


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the checkpoint. `command` lacks the batch size."""

    name: str
    weight_bits: float
    command: list[str]
    ours: bool

    def measure(self, batch: int) -> tuple[dict[str, float], dict[str, str]]:
        """(figures, versions) of one run. Raises RuntimeError or TimeoutExpired."""
        names = ("requests", "concurrency", "max_rows") if self.ours else ("batch_size",)
        report = run_json([*self.command, *(f"--{name}={batch}" for name in names)], FLAGS.timeout_s)
        return report["results"][0], report.get("versions", {})


def run_json(command: list[str], timeout_s: float) -> Any:
    """The JSON that a child process prints last. Raises RuntimeError with its last words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=_ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... exited {done.returncode}: {done.stderr[-800:]}")
    start = done.stdout.find("{")
    return json.loads(done.stdout[start:])


def sides(model: Path) -> list[Side]:
    """As the flags name them; peers that cannot be installed are left out. Raises UsageError for an unknown name."""
    lengths = [f"--model={model}", f"--prompt_tokens={FLAGS.prompt_tokens}", f"--output_tokens={FLAGS.output_tokens}"]
    found = []
    for name in FLAGS.novajax:
        if name not in _WEIGHT_BITS:
            raise app.UsageError(f"--novajax knows {', '.join(_WEIGHT_BITS)}, not {name!r}", exitcode=2)
        bits = _WEIGHT_BITS[name]
        form = [f"--dtype={name}"] if bits >= 16 else ["--dtype=bfloat16", f"--quantization={name}"]
        command = [sys.executable, "-m", "bench.throughput", *lengths, "--repetitions=1", "--noprobe", "--json", "--speculation=off", *form]
        command += shlex.split(FLAGS.engine_flags)
        found.append(Side(name=f"novajax-{name}", weight_bits=bits, command=command, ours=True))
    for name in FLAGS.peers:
        if name not in _PEERS:
            raise app.UsageError(f"--peers knows {', '.join(_PEERS)}, not {name!r}", exitcode=2)
        peer, weights, bits = _PEERS[name]
        try:
            python = environment.python_of(peer)
        except RuntimeError as error:
            common.say(f"{name} is left out: {error}")
            continue
        command = [str(python), f"bench/peers/{peer}_cpu.py", *lengths, f"--weights={weights}"]
        found.append(Side(name=name, weight_bits=bits, command=command, ours=False))
    return found


def parameters_read(model: Path) -> int:
    """Weights that one step multiplies: all matrices but the table of an untied model, from the checkpoint's headers."""
    count = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                rows, columns = (*entry["shape"], 0)[:2]
                count += rows * columns * (name != "model.embed_tokens.weight")
    config = json.loads((model / "config.json").read_text())
    return count + config["vocab_size"] * config["hidden_size"] * bool(config.get("tie_word_embeddings"))


def median(measured: list[dict[str, float]], figure: str) -> float:
    return statistics.median(item[figure] for item in measured)


def side_rows(rounds: dict[int, dict[str, list[dict[str, float]]]], bits: dict[str, float], parameters: int, read_rate: float | None):
    """[batch, side, output/s, decode/s, GFLOP/s of decode, weights' MB read per token, percent of the memory rate].

    A step reads each weight once for its whole batch: bytes per token = parameters * bits / 8 / batch; products of a token:
    2 * parameters. `read_rate` in bytes/s.
    """
    rows = []
    for batch, measured in rounds.items():
        for name, runs in measured.items():
            rate = median(runs, "decode_tokens_per_s")
            token_bytes = parameters * bits[name] / 8 / batch
            share = 100 * rate * token_bytes / read_rate if read_rate else None
            rows.append([batch, name, median(runs, _FIGURES[0]), rate, 2 * parameters * rate / 1e9, token_bytes / 1e6, share])
    return rows


def ratio_rows(rounds: dict[int, dict[str, list[dict[str, float]]]], ours: str, peer: str) -> list[list[Any]]:
    """[batch, figure, our side, peer, our median, their median, ratio] from {batch: {side: [figures of a round]}}."""
    rows = []
    for batch, measured in rounds.items():
        for figure in _FIGURES:
            mine, other = median(measured[ours], figure), median(measured[peer], figure)
            rows.append([batch, figure, ours, peer, mine, other, mine / other])
    return rows


def main(_: list[str]) -> int:
    machine = common.describe_machine(probe=common.PROBE.value)
    model = (Path(FLAGS.model) if FLAGS.model else shapes.checkpoint_from_flags()).resolve()
    entries = sides(model)
    rounds: dict[int, dict[str, list[dict[str, float]]]] = {}
    versions: dict[str, str] = {}
    try:
        for number in range(FLAGS.rounds):
            for batch in (int(text) for text in FLAGS.batch_sizes):
                measured = rounds.setdefault(batch, {side.name: [] for side in entries})
                for side in entries:
                    result, found = side.measure(batch)
                    versions |= found
                    measured[side.name].append(result)
                    common.say(f"round {number + 1}, batch {batch}, {side.name}: {result['output_tokens_per_s']:.1f} tokens/s")
    except (RuntimeError, subprocess.TimeoutExpired, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    bits = {side.name: side.weight_bits for side in entries}
    header = ["batch", "side", "output tokens/s", "decode tokens/s", "GFLOP/s", "weights' MB/token", "% of memory rate"]
    rows = side_rows(rounds, bits, parameters_read(model), machine.memory_read_bytes_per_s)
    # Blocks' scales put half a bit on a peer's weights: int() of q8_0's 8.5 bits is what ours are.
    pairs = [(a.name, b.name) for a in entries if a.ours for b in entries if not b.ours and int(a.weight_bits) == int(b.weight_bits)]
    ratios = [row for pair in pairs for row in ratio_rows(rounds, *pair)]
    ratio_header = ["batch", "figure", "ours", "peer", "NovaJAX", "the peer", "ratio"]
    report = {
        "benchmark": "compare",
        "machine": msgspec.to_builtins(machine),
        "settings": common.settings(__name__) | {"model": model.name},
        "versions": versions,
        "rounds": rounds,
        "results": [dict(zip(header, row, strict=True)) for row in rows],
        "ratios": [dict(zip(ratio_header, row, strict=True)) for row in ratios],
    }
    heading = f"{model.name}, {FLAGS.prompt_tokens} in, {FLAGS.output_tokens} out, median of {FLAGS.rounds} rounds; "
    heading += ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [common.machine_line(machine), heading, common.markdown_table(header, rows), common.markdown_table(ratio_header, ratios)]
    common.publish(report, "\n\n".join(parts))
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
