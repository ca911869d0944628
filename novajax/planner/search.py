"""Which layout, which profile, which pages: every way to cut a booking is tried, and each answer says why.

Candidates are ranked by output tokens/s of the whole booking without overlap (what a program that overlaps nothing could reach),
those that meet the wanted latencies first; of those nearly as good as the best the smallest group is taken. Refused candidates
keep their numbers.
"""

from collections.abc import Iterator

import msgspec

from novajax.core.errors import CapacityError, ConfigError
from novajax.parallel.axes import CUT_AXES, split_tensor_parallel
from novajax.planner.formats import Profile
from novajax.planner.hardware import Cluster
from novajax.planner.layout import Layout, span
from novajax.planner.memory import Demand, Memory, plan_memory
from novajax.planner.roofline import Bounds, bounds
from novajax.planner.sizes import ModelSizes

PROFILES_BY_QUALITY = ("bf16", "balanced", "int8", "int4", "memory_critical")
"""The order in which profile=auto tries; the first that fits is taken. fp8 is not among them: it must be asked for."""
PAGES = (64, 32, 16)
"""Tokens of a page on one device, in the order they are tried: large pages read faster, small ones waste less."""
NEARLY = 0.02
"""Of the best tokens/s: less is given up for a smaller group."""
MOST_WASTE = 0.02
"""Of a mean request, in the half page that is empty on average."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies to meet, in seconds; None: any."""

    ttft_s: float | None = None
    token_s: float | None = None

    def missed(self, found: Bounds) -> list[str]:
        """Which are out of reach even for the bound."""
        wants = (("first token", self.ttft_s, found.ttft_s), ("token", self.token_s, found.token_s))
        return [f"{what} in {want * 1e3:.0f} ms (bound {got * 1e3:.1f} ms)" for what, want, got in wants if want is not None and got > want]


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One layout with what it gives, or the reason it is refused."""

    layout: Layout
    profile: str
    page_tokens: int
    memory: Memory | None = None
    bounds: Bounds | None = None
    refused: str = ""
    missed: tuple[str, ...] = ()

    def fitted(self) -> tuple[Memory, Bounds]:
        """Both. Raises CapacityError for a refused candidate."""
        if self.memory is None or self.bounds is None:
            raise CapacityError(f"{self.layout.name()} in {self.profile}: {self.refused}", param="layout")
        return self.memory, self.bounds


def evaluate(sizes: ModelSizes, form: Profile, layout: Layout, booking: Cluster, demand: Demand, wanted: Wanted) -> Candidate:
    """One layout, fitted and bounded; refusals are data here, with their numbers."""
    what = {"layout": layout, "profile": form.name, "page_tokens": demand.page_tokens}
    try:
        memory = plan_memory(sizes, form, layout, booking, demand)
        if memory.rows < layout.data * layout.stage:
            mean = demand.prompt_tokens + demand.output_tokens
            needed = f"{layout.data * layout.stage} microbatches need a row each"
            return Candidate(**what, refused=f"the pool holds {memory.rows} requests of {mean:,} tokens; {needed}")
    except CapacityError as error:
        return Candidate(**what, refused=f"does not fit: {error.message}")
    except ConfigError as error:
        return Candidate(**what, refused=error.message)
    found = bounds(
        sizes,
        form,
        layout,
        booking,
        rows=memory.rows,
        prompt_tokens=demand.prompt_tokens,
        output_tokens=demand.output_tokens,
        chunk_tokens=demand.chunk_tokens,
    )
    return Candidate(**what, memory=memory, bounds=found, missed=tuple(wanted.missed(found)))


def layouts(sizes: ModelSizes, devices: int) -> Iterator[Layout]:
    """Every cut into equal replicas of tensor x stage x context that uses all devices. The data axis is left to those who ask:
    a replica does the same work and fails alone."""
    for tensor_parallel in _divisors(devices):
        try:
            tensor, query = split_tensor_parallel(tensor_parallel, sizes.kv_heads)
        except ConfigError:
            continue
        if sizes.heads % tensor_parallel:
            continue
        for stage in _divisors(devices // tensor_parallel):
            if stage > len(sizes.layers):
                continue
            for context in _divisors(devices // tensor_parallel // stage):
                yield Layout(1, stage, context, tensor, query, devices // (tensor_parallel * stage * context))


def choose_page_tokens(demand: Demand, context: int) -> tuple[int, str]:
    """(tokens of a page on one device, why)."""
    mean = demand.prompt_tokens + demand.output_tokens
    tokens = next((size for size in PAGES if size * context / 2 <= MOST_WASTE * mean), PAGES[-1])
    spread = f" (a logical page of {tokens * context} over {context} devices)" if context > 1 else ""
    waste = tokens * context / 2 / mean
    return tokens, f"pages of {tokens} tokens{spread}: half a page empty wastes {waste:.1%} of a mean request of {mean:,} tokens"


def search(sizes: ModelSizes, form: Profile, booking: Cluster, demand: Demand, wanted: Wanted, *, choose_pages: bool) -> list[Candidate]:
    """Every layout in one profile, best first, refused ones behind."""
    found = []
    for layout in layouts(sizes, booking.devices):
        pages = choose_page_tokens(demand, layout.context)[0] if choose_pages else demand.page_tokens
        found.append(evaluate(sizes, form, layout, booking, msgspec.structs.replace(demand, page_tokens=pages), wanted))
    return _simplest_first(sorted(found, key=_rank))


def best(candidates: list[Candidate]) -> Candidate:
    """The first that fits. Raises CapacityError with the closest refusals."""
    for one in candidates:
        if one.bounds:
            return one
    reasons = "; ".join(f"{one.layout.name()} {one.profile}: {one.refused}" for one in closest(candidates))
    raise CapacityError(f"no layout of these devices fits: {reasons}", param="layout")


def crossing(layout: Layout, booking: Cluster) -> str:
    """A warning when the axes that talk in every layer leave the host, else nothing."""
    over = span(layout, CUT_AXES, booking.gpus_per_host)
    if over.hosts == 1:
        return ""
    near, far = booking.chip.nvlink_bytes_per_s / 1e9, booking.network_bytes_per_s / 1e9
    return (
        f"tensor {layout.tensor_parallel} crosses hosts: each group spans {over.hosts} hosts of {booking.gpus_per_host} GPUs, so its two "
        f"all-reduces a layer go over the network at {far:.4g} GB/s a GPU in place of NVLink's {near:.4g} GB/s"
    )


def nearest_better(asked: Candidate, candidates: list[Candidate], booking: Cluster) -> Candidate | None:
    """The layout least different from the asked one that keeps tensor inside a host and gives more tokens/s without overlap."""
    floor = asked.bounds.total_serial_tokens_per_s if asked.bounds else 0.0
    better = [
        one
        for one in candidates
        if one.bounds and one.bounds.total_serial_tokens_per_s > floor and span(one.layout, CUT_AXES, booking.gpus_per_host).hosts == 1
    ]

    def distance(one: Candidate) -> tuple[int, float]:
        pairs = [(getattr(one.layout, name), getattr(asked.layout, name)) for name in ("stage", "context", "tensor_parallel", "replicas")]
        return sum(abs(a.bit_length() - b.bit_length()) for a, b in pairs), -one.fitted()[1].total_serial_tokens_per_s

    return min(better, key=distance, default=None)


def _rank(one: Candidate) -> tuple[bool, int, float, int]:
    tokens = one.bounds.total_serial_tokens_per_s if one.bounds else 0.0
    return one.bounds is None, len(one.missed), -tokens, one.layout.group_devices


def _simplest_first(ranked: list[Candidate]) -> list[Candidate]:
    """The smallest group of those nearly as good as the best comes first: a group fails as one."""
    top = ranked[0].bounds if ranked else None
    if top is None:
        return ranked
    floor = (1 - NEARLY) * top.total_serial_tokens_per_s
    near = [
        one for one in ranked if one.bounds and len(one.missed) <= len(ranked[0].missed) and one.bounds.total_serial_tokens_per_s >= floor
    ]
    chosen = min(near, key=lambda one: one.layout.group_devices)
    return [chosen, *(one for one in ranked if one is not chosen)]


def closest(candidates: list[Candidate], count: int = 3) -> list[Candidate]:
    """The refusals worth reading: those for lack of memory that cut the weights most, with the fewest other axes."""
    short = [one for one in candidates if one.refused.startswith("does not fit")] or [one for one in candidates if one.refused]
    return sorted(short, key=lambda one: (-one.layout.tensor_parallel * one.layout.stage, one.layout.context, one.layout.stage))[:count]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
