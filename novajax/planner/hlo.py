"""Collectives of a compiled program, read from XLA's text: kind, bytes, devices in a group, and how often each runs.

Instructions inside loops count as often as the loop's known trip count; those of called computations as often as their callers.
An asynchronous pair (-start, -done) counts once; where XLA combined several arrays into one operation, each array counts.
XLA:CPU may add bfloat16 in float32 ("promoted"); such sums are given in the bytes they would have on a GPU. Three syntaxes of
replica groups are read: lists, tiled iotas and mesh axes.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

import msgspec

from novajax.core.errors import InternalError

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?->.*\{\s*$")
_COLLECTIVE = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.+?) (" + "|".join(KINDS) + r")(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0}


class Found(msgspec.Struct, frozen=True, order=True):
    """One kind of collective. Bytes are the result's on one device; a permute's group is its longest chain or ring."""

    kind: str
    group: int
    bytes: int


def read_collectives(text: str) -> Counter[Found]:
    """How often each collective runs in one call of the compiled program. Raises InternalError for text that is not understood."""
    computations = _computations(text)
    partitions = int(match[1]) if (match := _PARTITIONS.search(text)) else 1
    times = _times(computations)
    found: Counter[Found] = Counter()
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.match(line)
            if match and times[name]:
                for one in _read(match, line, partitions):
                    found[one] += times[name]
    return found


def _computations(text: str) -> dict[str, list[str]]:
    """Lines by computation; the entry under ''."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if lines is None:
            match = _COMPUTATION.match(line)
            if match:
                lines = found.setdefault("" if match[1] else match[2], [])
        elif line.startswith("}"):
            lines = None
        else:
            lines.append(line)
    if "" not in found:
        raise InternalError("the compiled text has no ENTRY computation")
    return found


def _times(computations: dict[str, list[str]]) -> Counter[str]:
    """How often each computation runs. A loop without a known count counts once; of branches, each counts."""
    calls = {name: Counter(dict(_calls(lines))) for name, lines in computations.items()}
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        for callee in calls.get(name, ()):
            visit(callee)
        order.append(name)

    visit("")
    times = Counter({"": 1})
    for name in reversed(order):
        for callee, count in calls.get(name, Counter()).items():
            times[callee] += times[name] * count
    return times


def _calls(lines: list[str]) -> Iterator[tuple[str, int]]:
    counts: Counter[str] = Counter()
    for line in lines:
        trips = int(match[1]) if (match := _TRIPS.search(line)) else 1
        for callee in _CALLED.findall(line):
            counts[callee] += trips
        for branches in _BRANCHES.findall(line):
            for callee in branches.replace("%", "").split(","):
                counts[callee.strip()] += 1
    yield from counts.items()


def _read(match: re.Match[str], line: str, partitions: int) -> list[Found]:
    type_text, kind, start = match[1], match[2], match[3]
    shapes = [(dtype, dims) for dtype, dims in _SHAPE.findall(type_text) if not start or (dtype, dims) != ("u32", "")]
    if start and (kind != "all-reduce" or type_text.startswith("((")):
        shapes = shapes[len(shapes) // 2 :]  # (operands, results, contexts of u32[])
    widened = "_promoted" in line.partition("to_apply=")[2].split(",")[0]
    group = _group(kind, line, partitions)
    return [Found(kind, group, _bytes(dtype, dims) // (2 if widened else 1)) for dtype, dims in shapes]


def _bytes(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype)
    if bits is None:
        digits = re.search(r"\d+", dtype)
        if digits is None:
            raise InternalError(f"the compiled text has a type {dtype!r} of unknown size")
        bits = int(digits[0])
    return math.ceil(math.prod(int(size) for size in dims.split(",") if size) * bits / 8)


def _group(kind: str, line: str, partitions: int) -> int:
    if kind == "collective-permute":
        match = _PAIRS.search(line)
        pairs = re.findall(r"(\d+),(\d+)", match[1]) if match else []
        return _longest_chain([(int(a), int(b)) for a, b in pairs])
    if match := _LISTED.search(line):
        return len(match[1].split(","))
    if match := _IOTA.search(line):
        return int(match[2])
    if match := _MESH.search(line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    if "replica_groups={}" in line or "replica_groups" not in line:
        return partitions
    raise InternalError(f"the replica groups of {line.strip()[:200]!r} are not understood")


def _longest_chain(pairs: list[tuple[int, int]]) -> int:
    """Devices in the largest connected set."""
    parent: dict[int, int] = {}

    def root(device: int) -> int:
        while parent.setdefault(device, device) != device:
            device = parent[device]
        return device

    for source, target in pairs:
        parent[root(source)] = root(target)
    return max(Counter(root(device) for device in list(parent)).values(), default=1)
