"""Run in a process of its own: the same questions to an engine on one device and to engines on meshes of virtual devices.

With --quantization both have quantized weights; with --repeat=N the model has its layers N times over, for stages to share.
Prints one line for each (model, mesh). Exits 1 if any token differs, unless the best two log probabilities there are
closer than 1e-3.
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
from safetensors.numpy import load_file, save_file

from novajax.core.config import EngineConfig, MeshConfig, parse_mesh
from novajax.core.errors import ConfigError
from novajax.core.types import Request, SamplingParams, Update
from novajax.engine.build import open_engine
from novajax.engine.layout import Layout
from novajax.kv.pool import page_bytes
from novajax.parallel.mesh import mesh_for
from novajax.quant.cache import cache_format
from novajax.weights.describe import describe

NEAR_TIE = 1e-3
PROMPTS = 6
PAGE = 8
POOL_TOKENS = 96
"""Of each partition: too few for four sequences."""


class Answer(msgspec.Struct):
    tokens: list[int]
    gaps: list[float]


def questions(vocab: int, context: int) -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Prompts with a common beginning (prefix hits), one longer than a chunk; greedy, seeded and with penalties."""
    common = tuple((7 * i + 3) % (vocab - 8) + 4 for i in range(2 * PAGE + 1))
    asked = []
    for number in range(PROMPTS):
        own = tuple((11 * i + 5 * number) % (vocab - 8) + 4 for i in range(3 + (40 if number == 1 else 4 * number)))
        prompt = (common + own)[: context - 20]
        how = [
            {"temperature": 0.0},
            {"temperature": 0.8, "seed": 7, "top_p": 0.9},
            {"temperature": 0.9, "seed": 3, "presence_penalty": 0.5},
        ]
        asked.append((prompt, SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2, **how[number % 3])))
    return asked


async def ask(engine, asked) -> list[Answer]:
    async def one(number: int, prompt: tuple[int, ...], sampling: SamplingParams) -> Answer:
        answer = Answer([], [])
        async for update in engine.submit(Request(id=f"r{number}", prompt=prompt, sampling=sampling)):
            take(answer, update)
        return answer

    first = await one(0, *asked[0])  # alone, so that the others find its pages
    return [first, *await asyncio.gather(*(one(number, *of) for number, of in enumerate(asked[1:], start=1)))]


def take(answer: Answer, update: Update) -> None:
    answer.tokens += update.tokens
    for scores in update.logprobs:
        best = sorted((value for _, value in scores.top), reverse=True)
        answer.gaps.append(best[0] - best[1] if len(best) > 1 else 1.0)


def answers(model: Path, mesh: MeshConfig, quantization: str, kv: str) -> tuple[list[Answer], dict[str, int]]:
    """Few pages, so that sequences are preempted; small chunks, so that prompts come in several."""
    cfg = describe(model).config
    layout = Layout(mesh_for(mesh, cfg.kv_heads, jax.devices()), cfg)
    cache = cache_format(kv, quantization)
    one_page_bytes = page_bytes(layout.slots, cfg.kv_heads, PAGE, cfg.head_dim, jnp.float32, cache) // layout.mesh.shape["tensor"]
    config = EngineConfig(
        model=str(model),
        mesh=mesh,
        quantization=quantization,
        kv_cache_dtype=kv,
        max_rows=4 * mesh.data,
        page_tokens=PAGE,
        chunk_tokens=16,
        max_context_tokens=64,
        kv_bytes=POOL_TOKENS // (PAGE * mesh.context) * one_page_bytes,
    )

    async def run():
        engine = open_engine(config)
        card = await engine.card()
        found = await ask(engine, questions(card.vocab_size, 64))
        stats = await engine.stats()
        await engine.close()
        if stats.identity_violations or stats.compilations_after_ready:
            raise AssertionError(stats)
        return found, {"hits": stats.prefix_hit_tokens, "preemptions": stats.preemptions}

    return asyncio.run(run())


def compare(model: Path, mesh: MeshConfig, quantization: str, kv: str, wanted: list[Answer]) -> bool:
    name = " ".join(f"{axis}={size}" for axis, size in msgspec.to_builtins(mesh).items() if size > 1)
    began = time.monotonic()
    try:
        found, stats = answers(model, mesh, quantization, kv)
    except ConfigError as error:
        print(f"{model.name} | {name} | refused: {error.message}", flush=True)
        return True
    same, ties = True, []
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        at = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b), None)
        if at is not None and other.gaps[at] < NEAR_TIE:
            ties.append(f"request {number} token {at}: gap {other.gaps[at]:.1e}")
        elif at is not None or len(one.tokens) != len(other.tokens):
            same = False
    verdict = (
        "same" if same else f"DIFFERENT {[(a.tokens, b.tokens) for a, b in zip(found, wanted, strict=True) if a.tokens != b.tokens][:2]}"
    )
    print(
        f"{model.name} | {name} | {verdict}{' near ties: ' + '; '.join(ties) if ties else ''} | {stats} | {time.monotonic() - began:.1f} s",
        flush=True,
    )
    return same


def deeper(model: Path, times: int, parent: Path) -> Path:
    """A copy of the unsharded Hugging Face directory `model` with its layers, weights and kinds repeated `times` over."""
    made = parent / model.name
    made.mkdir()
    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    config["num_hidden_layers"] = layers * times
    if "layer_types" in config:
        config["layer_types"] *= times
    (made / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    for name, tensor in list(tensors.items()):
        head, marker, rest = name.partition("layers.")
        if marker:
            layer, _, leaf = rest.partition(".")
            for time_ in range(1, times):
                tensors[f"{head}layers.{int(layer) + time_ * layers}.{leaf}"] = tensor.copy()
    save_file(tensors, made / "model.safetensors")
    for path in model.glob("*token*"):
        shutil.copy(path, made)
    return made


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--meshes", nargs="+", required=True)
    parser.add_argument("--quantization", default="")
    parser.add_argument("--kv_cache_dtype", default="auto")
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            asked = model if args.repeat == 1 else deeper(model, args.repeat, Path(folder))
            wanted, _ = answers(asked, MeshConfig(), args.quantization, args.kv_cache_dtype)
            for mesh in args.meshes:
                good &= compare(asked, parse_mesh(mesh), args.quantization, args.kv_cache_dtype, wanted)
    return 0 if good else 1


sys.exit(main())
