"""Load generator for any OpenAI-compatible server: latencies, rates and goodput under a trace, a rate or a concurrency.

The same program measures NovaJAX and its peers. Requests are streamed; lengths come from the trace (scaled by one factor so
that the longest fits the model's context) or from --prompt_tokens and --output_tokens. A share of clients may vanish (half
through the body, while queued, mid-stream) and a share of requests may be malformed. Targets other than this machine need
--allow_remote.

Examples:
  python -m bench.serving --url=http://127.0.0.1:8000 --concurrency=8 --requests=200 --prompt_tokens=128 --output_tokens=64
  python -m bench.serving --mode=trace --trace=AzureLLMInferenceTrace_conv.csv --rate_factor=4 --requests=2000 \\
      --vanish_share=0.2 --bad_share=0.05 --out=/tmp/azure
  python -m bench.serving --mode=poisson --rate=3 --duration_s=60 --slo_ttft_s=0.5 --slo_tpot_s=0.1 --json

Exit code: 0 when every good request completed or was shed, 3 when some failed or broke, 2 for a bad flag or target.
"""

import asyncio
import logging
import random
import urllib.parse
from pathlib import Path
from typing import Any

import httpx
import msgspec
from absl import app, flags

from bench import common
from bench.client import Sample, Target, bad_requests
from bench.figures import Slo, figures, figures_table, plot
from bench.replay import replay_closed, replay_open
from bench.traffic import WORDS, Lengths, Planned, Prompts, make_plan, poisson_times_s, read_trace, scale_lengths
from novajax.server.settings import is_loopback

FLAGS = flags.FLAGS

_PROBE_WORDS = 200
_REQUESTS_CAP = 1_000_000


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    flags.adopt_module_key_flags(common)
    flags.DEFINE_string("url", "http://127.0.0.1:8000", "the server, without /v1")
    flags.DEFINE_string("model", None, "model name; the first that /v1/models lists if not given")
    flags.DEFINE_string("api_key", None, "sent as a bearer token")
    flags.DEFINE_bool("allow_remote", False, "permit a target that is not this machine")
    flags.DEFINE_bool("chat", False, "use /v1/chat/completions instead of /v1/completions")
    flags.DEFINE_enum("mode", "closed", ["trace", "poisson", "closed"], "when requests leave: by a trace, at random, or by free clients")
    flags.DEFINE_string("trace", None, "CSV with TIMESTAMP,ContextTokens,GeneratedTokens: arrivals in mode trace, lengths in any mode")
    flags.DEFINE_float("rate_factor", 1.0, "how much faster than recorded the trace is replayed", lower_bound=1e-6)
    flags.DEFINE_float("rate", 1.0, "requests per second in mode poisson", lower_bound=1e-6)
    flags.DEFINE_integer("concurrency", 8, "clients in mode closed", lower_bound=1)
    flags.DEFINE_integer("requests", 100, "how many requests", lower_bound=1, upper_bound=_REQUESTS_CAP)
    flags.DEFINE_float("duration_s", None, "stop sending after this many seconds")
    flags.DEFINE_integer("prompt_tokens", 128, "prompt length without a trace", lower_bound=1)
    flags.DEFINE_integer("output_tokens", 64, "answer length without a trace", lower_bound=1)
    flags.DEFINE_integer("context", None, "tokens the longest request may have; the server's own figure if it tells one")
    flags.DEFINE_enum("prompts", "words", ["words", "ids"], "plain words, or token ids below --vocab (completions only)")
    flags.DEFINE_integer("vocab", None, "vocabulary size for --prompts=ids")
    flags.DEFINE_float("tokens_per_word", None, "for --prompts=words; asked of the server's /tokenize if not given")
    flags.DEFINE_integer("shared_prefix_tokens", 0, "beginning that all prompts share", lower_bound=0)
    flags.DEFINE_bool("ignore_eos", True, "ask the server to generate the full length (an extension that most engines know)")
    flags.DEFINE_float("vanish_share", 0.0, "share of clients that leave early", lower_bound=0, upper_bound=1)
    flags.DEFINE_float("bad_share", 0.0, "share of malformed requests", lower_bound=0, upper_bound=1)
    flags.DEFINE_integer("max_open", 1000, "most requests open at once in modes trace and poisson", lower_bound=1)
    flags.DEFINE_float("timeout_s", 600.0, "longest silence of the server within one request", lower_bound=0.1)
    flags.DEFINE_integer("warmup", 2, "requests sent first and not counted", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of lengths, prompts and misbehaviour")
    flags.DEFINE_float("slo_ttft_s", None, "goodput: most seconds to the first token")
    flags.DEFINE_float("slo_tpot_s", None, "goodput: most seconds per output token")
    flags.DEFINE_float("slo_e2e_s", None, "goodput: most seconds to the end")


def require_loopback(url: str, allowed_remote: bool) -> None:
    """Raises UsageError for a target beyond this machine: load is not sent to others by accident."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if not allowed_remote and not is_loopback(host):
        raise app.UsageError(f"--url host {host!r} is not this machine; pass --allow_remote to load it all the same", exitcode=2)


async def discover_model(http: httpx.AsyncClient, wanted: str | None) -> tuple[str, int | None]:
    """(model id, context tokens if the server tells them)."""
    reply = await http.get("/v1/models")
    reply.raise_for_status()
    listed = reply.json()["data"]
    entry = next((item for item in listed if wanted in (None, item["id"])), None)
    if entry is None:
        raise app.UsageError(f"the server does not list the model {wanted!r}", exitcode=2)
    context = entry.get("max_model_len") or (entry.get("meta") or {}).get("n_ctx_train")
    return entry["id"], context


async def measure_tokens_per_word(http: httpx.AsyncClient, model: str) -> float | None:
    """By the server's own /tokenize (both common request shapes are tried); None when it has none."""
    draw = random.Random(0)
    text = " ".join(draw.choice(WORDS) for _ in range(_PROBE_WORDS))
    for body in ({"model": model, "prompt": text, "add_special_tokens": False}, {"content": text}):
        reply = await http.post("/tokenize", json=body)
        if reply.status_code == 200:
            tokens = len(reply.json().get("tokens") or ())
            if tokens:
                return tokens / _PROBE_WORDS
    return None


def plan_from_flags(context_tokens: int | None) -> list[Planned]:
    count = FLAGS.requests
    lengths = [Lengths(FLAGS.prompt_tokens, FLAGS.output_tokens)]
    times_s = [0.0] * count
    if FLAGS.trace:
        trace_times_s, lengths = read_trace(Path(FLAGS.trace))
        if FLAGS.mode == "trace":
            times_s = [time_s / FLAGS.rate_factor for time_s in trace_times_s[:count]]
    elif FLAGS.mode == "trace":
        raise app.UsageError("--mode=trace needs --trace", exitcode=2)
    if FLAGS.mode == "poisson":
        times_s = poisson_times_s(FLAGS.rate, count, random.Random(FLAGS.seed))
    if context_tokens is not None:
        lengths = scale_lengths(lengths[:count], context_tokens)
    if FLAGS.duration_s is not None:
        times_s = [time_s for time_s in times_s if time_s <= FLAGS.duration_s]
    return make_plan(
        times_s,
        lengths,
        vanish_share=FLAGS.vanish_share,
        bad_share=FLAGS.bad_share,
        bad_kinds=len(bad_requests("")),
        seed=FLAGS.seed,
    )


async def run_from_flags() -> tuple[list[Sample], dict[str, Any]]:
    """Performs the run; returns its samples and its settings."""
    require_loopback(FLAGS.url, FLAGS.allow_remote)
    async with httpx.AsyncClient(base_url=FLAGS.url, timeout=30, trust_env=False, headers=_auth()) as http:
        model, context = await discover_model(http, FLAGS.model)
        tokens_per_word = FLAGS.tokens_per_word
        if FLAGS.prompts == "words" and tokens_per_word is None:
            tokens_per_word = await measure_tokens_per_word(http, model)
    if FLAGS.prompts == "ids" and not FLAGS.vocab:
        raise app.UsageError("--prompts=ids needs --vocab", exitcode=2)
    if FLAGS.prompts == "ids" and FLAGS.chat:
        raise app.UsageError("--prompts=ids needs /v1/completions", exitcode=2)
    context = FLAGS.context or context
    plan = plan_from_flags(context)
    prompts = Prompts(
        seed=FLAGS.seed,
        vocab=FLAGS.vocab if FLAGS.prompts == "ids" else None,
        tokens_per_word=tokens_per_word or 1.0,
        shared_tokens=FLAGS.shared_prefix_tokens,
    )
    extra = {"ignore_eos": True} if FLAGS.ignore_eos else {}
    target = Target(FLAGS.url, model, chat=FLAGS.chat, api_key=FLAGS.api_key, timeout_s=FLAGS.timeout_s, extra=extra)
    count, finished = len(plan), 0

    def on_sample(_: Sample) -> None:
        nonlocal finished
        finished += 1
        if finished % max(1, count // 20) == 0:
            common.say(f"{finished}/{count} requests")

    try:
        warm = [Planned(index=-1 - i, at_s=0.0, lengths=plan[i % count].lengths) for i in range(FLAGS.warmup)]
        await replay_closed(target, warm, prompts, concurrency=1)
        if FLAGS.mode == "closed":
            samples = await replay_closed(
                target, plan, prompts, concurrency=FLAGS.concurrency, duration_s=FLAGS.duration_s, on_sample=on_sample
            )
        else:
            samples = await replay_open(target, plan, prompts, max_open=FLAGS.max_open, on_sample=on_sample)
    finally:
        await target.close()
    settings = common.settings(__name__, hidden=["api_key"])
    settings |= {"model": model, "context_tokens": context, "tokens_per_word": tokens_per_word}
    return samples, settings


def _auth() -> dict[str, str]:
    return {"Authorization": f"Bearer {FLAGS.api_key}"} if FLAGS.api_key else {}


def main(_: list[str]) -> int:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it writes a line for each request
    machine = common.describe_machine(probe=common.PROBE.value)
    try:
        samples, settings = asyncio.run(run_from_flags())
    except (httpx.HTTPError, ValueError, OSError) as error:
        raise app.UsageError(f"{FLAGS.url}: {error}", exitcode=2) from error
    result = figures(samples, Slo(ttft_s=FLAGS.slo_ttft_s, tpot_s=FLAGS.slo_tpot_s, e2e_s=FLAGS.slo_e2e_s))
    report = {
        "benchmark": "serving",
        "machine": msgspec.to_builtins(machine),
        "settings": settings,
        "results": msgspec.to_builtins(result),
        "samples": msgspec.to_builtins(samples),
    }
    common.publish(report, f"{common.machine_line(machine)}\n\n{figures_table(result)}")
    if common.OUT.value:
        plot(samples, Path(common.OUT.value + ".png"), f"{settings['model']}, {FLAGS.mode}")
    return 3 if any(result.outcomes.get(name) for name in ("failed", "broken")) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
