"""Published results beside our bounds for the same model, chips, formats and lengths. A bound that a measurement beats is wrong.

The bound gives the publisher every doubt: all of the memory for weights and pages, requests at their mean length, no chunks,
full overlap, no host, and no word between devices (how another program talks is not known). Lengths that were not published
cost nothing.
"""

from typing import Literal

import msgspec

from novajax.parallel.axes import split_tensor_parallel
from novajax.planner.formats import profile
from novajax.planner.hardware import Cluster, cluster
from novajax.planner.layout import Layout
from novajax.planner.memory import device_kv_token_bytes, weights_bytes
from novajax.planner.roofline import bounds
from novajax.planner.sizes import ModelSizes

TRT_LLM = "TensorRT-LLM 1.0 performance overview, maximum throughput"
MODELOPT = "NVIDIA ModelOpt, 8xH200"
MLPERF = "MLPerf Inference v5.1 offline; mean output from mlcommons/inference language/llama3.1-405b, prompt length not charged"
PAPER = "arXiv 2411.01783, prefill on 16 hosts"


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """One result as its source gives it."""

    source: str
    model: Literal["8b", "70b", "405b"]
    """Of Llama 3.1."""
    chip: str
    devices: int
    profile: str
    prompt_tokens: int
    output_tokens: int
    measure: Literal["output tokens/s", "seconds to first token"]
    value: float
    context: int = 1
    """Devices that a prompt is spread over, by the hosts' number; each host cuts the matrices."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A bound, what was published, and the share of the bound that was reached (at most 1, or the bound is wrong)."""

    published: Published
    bound: float
    reached: float


def published() -> tuple[Published, ...]:
    """What the bounds are held against."""

    def throughput(source: str, model: str, chip: str, devices: int, value: float, prompt: int, output: int) -> Published:
        row = {"source": source, "model": model, "chip": chip, "devices": devices, "value": value, "profile": "fp8"}
        return msgspec.convert(row | {"prompt_tokens": prompt, "output_tokens": output, "measure": "output tokens/s"}, Published)

    def prefill(prompt: int, seconds: float) -> Published:
        return Published(
            source=PAPER,
            model="405b",
            chip="h100",
            devices=128,
            profile="fp8",
            prompt_tokens=prompt,
            output_tokens=1,
            measure="seconds to first token",
            value=seconds,
            context=16,
        )

    lengths = ((128, 2048), (1000, 1000), (2048, 128), (2048, 2048), (20000, 2000))
    overview = [
        throughput(TRT_LLM, "405b", chip, 8, value, prompt, output)
        for chip, values in (("h100", (4340, 2919, 453, 2296, 345)), ("h200", (5348, 3330, 456, 2948, 505)))
        for value, (prompt, output) in zip(values, lengths, strict=True)
    ]
    smaller = [("70b", "h200", 1, 4336, 442), ("70b", "h100", 2, 6651, 762), ("8b", "h100", 1, 22714, 3450)]
    overview += [throughput(TRT_LLM, m, chip, n, value, 128, 2048) for m, chip, n, value, _ in smaller]
    overview += [throughput(TRT_LLM, m, chip, n, value, 2048, 128) for m, chip, n, _, value in smaller]
    return (
        throughput(MLPERF, "405b", "h200", 8, 552.7, 0, 685),
        *overview,
        throughput(MODELOPT, "405b", "h200", 8, 463, 2_000, 128),
        throughput(MODELOPT, "405b", "h200", 8, 320, 32_000, 2_000),
        throughput(MODELOPT, "405b", "h200", 8, 71.5, 120_000, 2_000),
        prefill(131_072, 3.8),
        prefill(1_000_000, 77.0),
    )


def compare(result: Published, sizes: ModelSizes) -> Comparison:
    """The bound of one published result. `sizes` are its model's."""
    per_host = min(result.devices, 8)
    booking = cluster(result.chip, -(-result.devices // per_host), per_host)
    tensor, query = split_tensor_parallel(per_host, sizes.kv_heads)
    layout = Layout(context=result.context, tensor=tensor, query=query)
    form = profile(result.profile)
    best = bounds(
        sizes,
        form,
        layout,
        booking,
        rows=_most_rows(result, sizes, layout, booking),
        prompt_tokens=result.prompt_tokens,
        output_tokens=result.output_tokens,
        chunk_tokens=max(1, result.prompt_tokens),
    )
    if result.measure == "seconds to first token":
        first_s = max(best.prefill.math_s, best.prefill.hbm_s)
        return Comparison(published=result, bound=first_s, reached=first_s / result.value)
    tokens_per_s = best.rows / max(best.mixed.math_s, best.mixed.hbm_s)
    return Comparison(published=result, bound=tokens_per_s, reached=result.value / tokens_per_s)


def _most_rows(result: Published, sizes: ModelSizes, layout: Layout, booking: Cluster) -> float:
    """Sequences whose mean length fills all the memory that weights leave."""
    form = profile(result.profile)
    left = booking.chip.hbm_bytes - sum(weights_bytes(sizes, form, layout).values())
    tokens = left / device_kv_token_bytes(sizes, form, layout) * layout.context
    return tokens / (result.prompt_tokens + result.output_tokens / 2)
