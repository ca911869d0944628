"""NovaJAX beside Hugging Face transformers on the same checkpoint, same lengths, same machine, interleaved in one run.

Each round measures one engine, then the other, in processes of their own, so that a change of the machine's load meets
both. Reported: the median of the rounds of each, and the ratio of medians. The peer's batch is one static `generate` call;
ours is that many requests through the scheduler, without guesses of next tokens: random weights repeat themselves, and no peer guesses.

Examples:
  python -m bench.compare --shape=135m --rounds=3
  python -m bench.compare --model=DIR --prompt_tokens=128 --output_tokens=128 --batch_sizes=1,16 --out=/tmp/compare
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


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    shapes.define_flags()
    environment.define_flags()
    for module in (common, shapes, environment):
        flags.adopt_module_key_flags(module)
    flags.DEFINE_string("model", None, "a Hugging Face directory; else the checkpoint of --shape is made")
    flags.DEFINE_integer("rounds", 3, "how often each is measured, in turn", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 128, "prompt length", lower_bound=1)
    flags.DEFINE_integer("output_tokens", 128, "answer length", lower_bound=2)
    flags.DEFINE_list("batch_sizes", ["1", "16"], "sequences at once")
    flags.DEFINE_string("engine_flags", "", "more flags for our engine, like '--dtype=bfloat16 --quantization=int8'")
    flags.DEFINE_float("timeout_s", 1800.0, "most seconds for one measurement")


def run_json(command: list[str], timeout_s: float) -> Any:
    """The JSON that a child process prints last. Raises RuntimeError with its last words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=_ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... exited {done.returncode}: {done.stderr[-800:]}")
    start = done.stdout.find("{")
    return json.loads(done.stdout[start:])


def ours(model: Path, batch: int) -> dict[str, float]:
    """Medians are taken over rounds, so one repetition each."""
    command = [sys.executable, "-m", "bench.throughput", f"--model={model}", f"--requests={batch}", f"--concurrency={batch}"]
    command += [f"--prompt_tokens={FLAGS.prompt_tokens}", f"--output_tokens={FLAGS.output_tokens}"]
    command += ["--repetitions=1", "--noprobe", "--json", f"--max_rows={batch}", "--speculation=off", *shlex.split(FLAGS.engine_flags)]
    return run_json(command, FLAGS.timeout_s)["results"][0]


def theirs(python: Path, model: Path, batch: int) -> tuple[dict[str, float], dict[str, str]]:
    command = [str(python), "bench/peers/transformers_cpu.py", f"--model={model}", f"--batch_sizes={batch}", "--repetitions=1"]
    command += [f"--prompt_tokens={FLAGS.prompt_tokens}", f"--output_tokens={FLAGS.output_tokens}"]
    report = run_json(command, FLAGS.timeout_s)
    return report["results"][0], report["versions"]


def ratio_rows(rounds: dict[int, dict[str, list[dict[str, float]]]]) -> list[list[Any]]:
    """[batch, figure, our median, their median, ratio] from {batch: {"novajax": [...], "transformers": [...]}}."""
    rows = []
    for batch, measured in rounds.items():
        for figure in _FIGURES:
            mine = statistics.median(item[figure] for item in measured["novajax"])
            peer = statistics.median(item[figure] for item in measured["transformers"])
            rows.append([batch, figure, mine, peer, mine / peer])
    return rows


def main(_: list[str]) -> int:
    machine = common.describe_machine(probe=common.PROBE.value)
    model = (Path(FLAGS.model) if FLAGS.model else shapes.checkpoint_from_flags()).resolve()
    try:
        python = environment.transformers_python()
        rounds: dict[int, dict[str, list[dict[str, float]]]] = {}
        versions: dict[str, str] = {}
        for number in range(FLAGS.rounds):
            for batch in (int(text) for text in FLAGS.batch_sizes):
                measured = rounds.setdefault(batch, {"novajax": [], "transformers": []})
                measured["novajax"].append(ours(model, batch))
                result, versions = theirs(python, model, batch)
                measured["transformers"].append(result)
                pair = (measured[name][-1]["output_tokens_per_s"] for name in ("novajax", "transformers"))
                common.say(f"round {number + 1}, batch {batch}: " + " against ".join(f"{rate:.1f}" for rate in pair) + " tokens/s")
    except (RuntimeError, subprocess.TimeoutExpired, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = ratio_rows(rounds)
    report = {
        "benchmark": "compare",
        "machine": msgspec.to_builtins(machine),
        "settings": common.settings(__name__) | {"model": model.name},
        "versions": versions,
        "rounds": rounds,
        "results": [dict(zip(("batch", "figure", "novajax", "transformers", "ratio"), row, strict=True)) for row in rows],
    }
    peer = ", ".join(f"{name} {version}" for name, version in versions.items())
    heading = f"{model.name}, {FLAGS.prompt_tokens} in, {FLAGS.output_tokens} out, median of {FLAGS.rounds} rounds; peer: {peer}"
    table = common.markdown_table(["batch", "figure", "NovaJAX", "transformers", "ratio"], rows)
    common.publish(report, f"{common.machine_line(machine)}\n\n{heading}\n\n{table}")
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
