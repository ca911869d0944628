"""The KV cache's formats: by name, and how keys and values are rounded to them.

Each token's vector of each head has a scale of its own, so that a page never has to be rounded again, and what is stored does not
depend on who else is in the batch or on how the heads are cut over devices.
"""

import jax
import msgspec

from novajax.core.errors import ConfigError
from novajax.kernels.nibbles import packed
from novajax.kv.pool import CacheFormat, Kind
from novajax.planner.formats import profiles
from novajax.quant.aqt import quantize

AUTO = "auto"
MODEL = "model"
_NAMED = {MODEL: CacheFormat(), "int8": CacheFormat("int8", "int8"), "fp8": CacheFormat("fp8", "fp8")}
_NAMED["int8-int4"] = CacheFormat("int8", "int4")


def cache_format(name: str, quantization: str) -> CacheFormat:
    """`model` (the engine's dtype), `int8`, `fp8`, `int8-int4` (keys, values), or `auto`: as the precision profile `quantization` says,
    `model` where it says nothing. Raises ConfigError for another name."""
    if name == AUTO:
        row = profiles().get(quantization)
        rounded = {} if row is None else {"keys": row.keys, "values": row.values}
        return msgspec.convert({side: kind for side, kind in rounded.items() if kind not in ("float32", "bfloat16")}, CacheFormat)
    if name not in _NAMED:
        raise ConfigError(f"KV cache format {name!r} is not known; known: {AUTO}, {', '.join(_NAMED)}", param="kv_cache_dtype")
    return _NAMED[name]


def rounded(x_TKH: jax.Array, kind: Kind | None) -> tuple[jax.Array, jax.Array | None]:
    """(numbers, float32 scales_TK or None) as a `kv.pool.Paged` of that kind holds them."""
    if kind is None:
        return x_TKH, None
    numbers, scale = quantize(x_TKH, (1, 1, x_TKH.shape[-1]), kind)
    return packed(numbers) if kind == "int4" else numbers, scale[..., 0]
