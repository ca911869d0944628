"""Answers a file of requests with a model, offline: OpenAI batch lines in, batch output lines out, resumable at any moment.

Each input line is {"custom_id", "method": "POST", "url": "/v1/chat/completions" or "/v1/completions", "body": {...}}, or just
{"prompt": ...} or {"messages": [...]} with the same fields as a body. Every line gets exactly one output line
{"id", "line", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}, in order of completion (--ordered sorts
them at the end). A bad line fails alone; its error names its line number. Run the same command again after a crash, a
kill or a full disk: finished lines are kept, the rest is done. Records are synced to disk every --sync_every_s seconds.

Examples:
  python -m novajax.batch --model=checkpoints/nova-small --input=in.jsonl --output=out.jsonl
  python -m novajax.batch --model=DIR --input=in.jsonl --output=out.jsonl --ordered --json > summary.json
  python -m novajax.batch --model=org/name@revision --input=in.jsonl --output=out.jsonl --max_rows=64
  python -m novajax.batch --model=DIR --input=in.jsonl --output=out.jsonl --processes=2 --mesh=tensor=2

With --processes, or on many hosts under Slurm, Kubernetes or with --process_id and its companions, the engine is a group of
processes: start this on each host; the first one reads and writes the files. A lost rank is started again and the run goes on.

Exit codes: 0 every line succeeded; 1 or 2 flags, input, output or model not usable (nothing was written); 3 every line has
its output, some failed; 4 stopped early (disk full, engine failed: run the same command again; input changed: it says so);
130 or 143 interrupted: run the same command again.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
from absl import app, flags

from novajax import group, options
from novajax.cluster.child import EngineProcess
from novajax.cluster.remotehost import attend
from novajax.core.backend import Backend
from novajax.core.config import EngineConfig, parse_bytes
from novajax.core.errors import ConfigError, Conflict, NovaError
from novajax.core.types import MAX_ALTERNATIVES, Phase
from novajax.offline.output import OutputStopped
from novajax.offline.run import BatchOptions, BatchSummary, InputChanged, run_batch
from novajax.telemetry.progress import Progress, seconds
from novajax.weights.source import resolve

FLAGS = flags.FLAGS

_NOT_USABLE, _SOME_FAILED, _STOPPED = 2, 3, 4
_LINES_PER_ROW = 4
"""Lines asked at once for each row of the engine: enough to keep it full."""


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    options.define_engine_flags()
    flags.adopt_module_key_flags(options)
    group.define_group_flags()
    flags.adopt_module_key_flags(group)
    flags.DEFINE_string("input", None, "JSON lines to answer", required=True)
    flags.DEFINE_string("output", None, "JSON lines with the answers; appended to, locked against a second writer", required=True)
    flags.DEFINE_bool("ordered", False, "when all is done, rewrite the output in the order of the input")
    flags.DEFINE_integer("max_in_flight", None, "lines asked at once; four for each of --max_rows if not given", lower_bound=1)
    flags.DEFINE_string("max_line_bytes", "8Mi", "a longer line fails without being read into memory")
    flags.DEFINE_float("sync_every_s", 5.0, "seconds between syncs: what a power cut can cost", lower_bound=0.1)
    flags.DEFINE_list("model_names", [], "names that a body's `model` may have, beside the served one")
    flags.DEFINE_bool("ignore_model", False, "answer lines whatever model they name")
    flags.DEFINE_string("chat_template", None, "Jinja file to use in place of the model's chat template")
    flags.DEFINE_bool("json", False, "print the summary as JSON on stdout")


def main(_: list[str]) -> int:
    try:
        file = options.read_config(FLAGS)
        config = options.engine_config(FLAGS, file)
        processes = group.read_group(FLAGS, file.cluster, os.environ)
        if processes.place.index:
            return asyncio.run(attend(processes.follower(_on_disk(config))))
        how = batch_options(config)
        if not Path(FLAGS.input).is_file():  # before minutes of loading and compiling
            raise ConfigError(f"input {FLAGS.input} is not a file", param="input")
        config = msgspec.structs.replace(config, max_waiting=max(config.max_waiting, how.max_in_flight * MAX_ALTERNATIVES))
        summary = _run_alone(config, how) if processes.alone else asyncio.run(_run_group(_on_disk(config), processes, how))
    except InputChanged as error:
        return _leave(error.message, _STOPPED)
    except (ConfigError, Conflict) as error:
        return _leave(error.message, _NOT_USABLE)
    except (OutputStopped, NovaError) as error:
        return _leave(f"{error}\nrun the same command again to go on", _STOPPED)
    except _Interrupted as interrupted:
        return _leave("interrupted; run the same command again to go on", 128 + interrupted.signal_number)
    _print_summary(summary)
    return _SOME_FAILED if summary.failed_in_output else 0


def batch_options(config: EngineConfig) -> BatchOptions:
    """Raises ConfigError for a value out of bounds."""
    values = {
        "max_in_flight": FLAGS.max_in_flight or _LINES_PER_ROW * config.max_rows,
        "max_line_bytes": parse_bytes(FLAGS.max_line_bytes),
        "sync_every_s": FLAGS.sync_every_s,
        "ordered": FLAGS.ordered,
    }
    try:
        return msgspec.convert(values, BatchOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None


class _Interrupted(Exception):
    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


def _run_alone(config: EngineConfig, how: BatchOptions) -> BatchSummary:
    from novajax.engine.build import open_engine  # jax starts only after the flags were understood

    return asyncio.run(_answer_all(open_engine(config, _announce), how))


async def _run_group(config: EngineConfig, processes: group.Group, how: BatchOptions) -> BatchSummary:
    """Raises ConfigError when the group cannot start."""
    engine = EngineProcess(config, processes.settings, processes.place, secret=processes.secret)
    supervising = asyncio.create_task(engine.run())
    answering = asyncio.create_task(_answer_all(engine.backend, how))
    try:
        await asyncio.wait({supervising, answering}, return_when=asyncio.FIRST_COMPLETED)
        if supervising.done():
            supervising.result()
        return await answering
    finally:
        for task in (answering, supervising):
            task.cancel()
        await asyncio.gather(answering, supervising, return_exceptions=True)
        await engine.close()


def _on_disk(config: EngineConfig) -> EngineConfig:
    """The same for all processes: the model is fetched once, and has its name."""
    source = resolve(config.model)
    return msgspec.structs.replace(config, model=str(source.directory), served_name=config.served_name or source.name)


async def _answer_all(backend: Backend, how: BatchOptions) -> BatchSummary:
    """The run, ended by the first SIGINT or SIGTERM after what was written is safe."""
    from novajax.offline.answer import Answerer
    from novajax.text.template import ChatTemplate
    from novajax.text.tokenizer import Tokenizer

    caught: list[int] = []
    task = asyncio.current_task()

    def stop(number: int) -> None:
        caught.append(number)
        if task is not None:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        card = await backend.card()
        tokenizer = Tokenizer(card.directory)
        answerer = Answerer(
            backend,
            tokenizer,
            ChatTemplate(tokenizer, FLAGS.chat_template),
            model_names=(card.id, *FLAGS.model_names),
            ignore_model=FLAGS.ignore_model,
            max_line_bytes=how.max_line_bytes,
        )
        return await run_batch(backend, answerer, Path(FLAGS.input), Path(FLAGS.output), how, report=Progress)
    except asyncio.CancelledError:
        if caught:
            raise _Interrupted(caught[0]) from None
        raise
    finally:
        await backend.close()


def _print_summary(summary: BatchSummary) -> None:
    if FLAGS.json:
        sys.stdout.write(msgspec.json.encode(summary).decode() + "\n")
        return
    earlier = f", {summary.resumed} of earlier runs" if summary.resumed else ""
    sys.stderr.write(
        f"{summary.lines} lines: {summary.succeeded} answered and {summary.failed} failed in {seconds(summary.elapsed_s)}{earlier}; "
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.1f} output tokens/s; "
        f"failed lines in the output: {summary.failed_in_output}\n"
    )


def _announce(phase: Phase, detail: str) -> None:
    sys.stderr.write(f"{phase}: {detail}\n")


def _leave(message: str, code: int) -> int:
    sys.stderr.write(message + "\n")
    return code


if __name__ == "__main__":
    define_flags()
    app.run(main)
