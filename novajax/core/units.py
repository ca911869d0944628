"""Quantities as people write them: '64Gi', '2xH100', '200Gbps', '200ms'. Each parser refuses what it cannot read, by name."""

import math
import re

import msgspec

from novajax.core.errors import ConfigError

_RATES = {"bps": 1.0, "kbps": 1e3, "mbps": 1e6, "gbps": 1e9, "tbps": 1e12}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_GPUS = re.compile(r"(\d{1,6})\s*x\s*([A-Za-z][A-Za-z0-9_-]*)", re.ASCII)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", re.ASCII)
_CPUS = re.compile(r"(\d+(?:\.\d+)?)(m?)", re.ASCII)


class Gpus(msgspec.Struct, frozen=True):
    """So many of one kind."""

    count: int
    kind: str
    """Lower case, like 'h100'."""


def parse_gpus(text: str) -> Gpus:
    """'2xH100' -> 2 of h100. Raises ConfigError."""
    match = _GPUS.fullmatch(text.strip())
    if not match or not int(match[1]):
        raise ConfigError(f"{text!r} is not a number of GPUs (try 8xH100)")
    return Gpus(int(match[1]), match[2].lower())


def parse_bytes_per_s(text: str) -> float:
    """'200Gbps' -> 25e9 bytes/s (network rates are decimal bits). Raises ConfigError."""
    return _scaled(text, _RATES, "a network rate (try 200Gbps)") / 8


def parse_seconds(text: str) -> float:
    """'200ms' -> 0.2. Raises ConfigError."""
    return _scaled(text, _TIMES, "a time (try 200ms)")


def parse_cpus(text: str) -> float:
    """'16' or '500m' (thousandths, as Kubernetes has them) -> CPUs. Raises ConfigError."""
    match = _CPUS.fullmatch(text.strip())
    if not match or not float(match[1]):
        raise ConfigError(f"{text!r} is not a number of CPUs (try 16 or 500m)")
    return float(match[1]) / (1000 if match[2] else 1)


def _scaled(text: str, units: dict[str, float], what: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    value = float(match[1]) * units.get(match[2].lower(), math.nan) if match else math.nan
    if not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{text!r} is not {what}")
    return value
