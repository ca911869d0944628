"""What an engine can be told. `auto` values are None here and are resolved once, by pure functions, before anything is built."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from novajax.core.errors import ConfigError


class MeshConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one program is cut over devices; the product is the number of devices. See `parallel.mesh` for the axes."""

    data: Annotated[int, Meta(ge=1)] = 1
    """Partitions of the batch, each with pages of its own."""
    stage: Annotated[int, Meta(ge=1)] = 1
    """Pipeline stages over the layers."""
    context: Annotated[int, Meta(ge=1)] = 1
    """Devices over which the tokens of one sequence are spread."""
    tensor_parallel: Annotated[int, Meta(ge=1)] = 1
    """Devices over which every matrix is cut; beyond the number of KV heads, query heads are cut within their group."""

    @property
    def devices(self) -> int:
        return self.data * self.stage * self.context * self.tensor_parallel


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: a model on the devices of one mesh."""

    model: str
    """A Hugging Face directory, a sealed NovaJAX directory, or a hub id `org/name[@revision]`."""
    served_name: str = ""
    """Name in the API; empty: the last part of `model`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on an accelerator, float32 on a CPU (where bfloat16 needs native kernels: XLA:CPU has no fast one-row form)."""
    quantization: str = ""
    """A precision profile (memory_critical, balanced, quality_critical) or a weight format (int8, fp8, int4, int4-32 ...); empty: none."""
    kv_cache_dtype: str = "auto"
    """What KV pages hold: model (the engine's dtype), int8, fp8, int8-int4 (keys, values); auto: as the precision profile says."""
    mesh: MeshConfig = MeshConfig()
    max_rows: Annotated[int, Meta(ge=1, le=1024)] = 16
    """Most sequences that run at once; with data partitions a multiple of their number."""
    max_context_tokens: Annotated[int, Meta(ge=16)] | None = None
    """None: the model's own."""
    page_tokens: Annotated[int, Meta(ge=8, le=256)] = 16
    kv_bytes: Annotated[int, Meta(ge=1)] | None = None
    """Bytes of the KV pool. None: enough for max_rows full contexts, or what the memory leaves if that is less."""
    chunk_tokens: Annotated[int, Meta(ge=16, le=16384)] = 256
    """Most prompt tokens of one sequence in one step."""
    max_waiting: Annotated[int, Meta(ge=0, le=100_000)] = 256
    """Requests that may queue; one more is refused with 429."""
    in_flight: Annotated[int, Meta(ge=1, le=4)] = 2
    """Plans on the device at once: 1 synchronous, 2 runs one step ahead."""
    prefix_cache: bool = True
    deterministic: bool = False
    """One bucket for every step: an answer has the same bits alone and in a crowd, at the cost of padding."""
    speculation: Literal["auto", "off", "lookup", "draft"] = "auto"
    """Who guesses the next tokens, so that one step can bring several. lookup: what followed the same tokens before in the sequence; draft:
    `draft_model`; auto: the draft model if one is named, else lookup, where steps can have guesses (one stage, not deterministic).
    Answers are the same; guesses rest while they do not pay."""
    draft_model: str = ""
    """A small model with the same tokens as `model`, named in the same ways, which is not quantized; one device. Empty: none."""
    compile_cache: str = ""
    """Directory of kept programs, which must be this user's alone: it holds code. Empty: none."""
    native_kernels: Literal["auto", "on", "off"] = "auto"
    """Kernels in C++ on one CPU device, built once into `compile_cache`; auto: where a compiler is. Matrices lie as they read them."""
    trace_file: str = ""
    """Where the last steps' times are written when the engine ends, in Chrome's trace format; empty: nowhere."""
    verify_hashes: bool = True
    """Check the manifest of a sealed model on load."""


def parse_mesh(mesh: str | dict[str, Any], param: str = "mesh") -> MeshConfig:
    """'tensor=2,stage=2', or the same as a mapping; `tensor` stands for tensor_parallel. Raises ConfigError naming `param`."""
    names = {"tensor": "tensor_parallel"} | {name: name for name in MeshConfig.__struct_fields__}
    if isinstance(mesh, str):
        parts = [part.partition("=") for part in mesh.split(",") if part.strip()]
        given = [(name.strip(), int(size) if size.strip().isdecimal() else size) for name, _, size in parts]
    elif isinstance(mesh, dict):
        given = list(mesh.items())
    else:
        raise ConfigError(f"{param} {mesh!r} is not a mapping of axes to numbers", param=param)
    sizes: dict[str, Any] = {}
    for name, size in given:
        if name not in names or type(size) is not int or size < 1:
            axes = "data, stage, context, tensor"
            raise ConfigError(f"{param} {mesh!r}: {name}={size} is not AXIS=SIZE with an axis of {axes} and a size from 1", param=param)
        if names[name] in sizes:
            raise ConfigError(f"{param} {mesh!r} names {name!r} twice", param=param)
        sizes[names[name]] = size
    return MeshConfig(**sizes)


def parse_bytes(text: str) -> int:
    """'512Mi', '1Ti', '2GB', '4096' -> bytes (binary for Ki..Ti, decimal for K/KB..T/TB). Raises ConfigError."""
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {f"{letter}i": 1024**power, f"{letter}ib": 1024**power, letter: 1000**power, f"{letter}b": 1000**power}
    digits = text.strip().rstrip("KMGTkmgtiIbB")
    unit = text.strip()[len(digits) :].lower()
    try:
        return int(float(digits) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(f"{text!r} is not a size in bytes (try 512Mi, 1Ti or 2GB)") from None
