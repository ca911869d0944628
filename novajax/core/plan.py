"""The `plan:` section of a configuration: what to plan for. `auto` values are chosen by the planner, with reasons."""

from typing import Annotated

import msgspec
from msgspec import Meta

Size = Annotated[int, Meta(ge=1)]


class PlanConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A booking, a precision and a kind of request."""

    chip: str = "h100"
    nodes: Size = 1
    gpus_per_node: Size | None = None
    """None: the chip's usual host."""
    network_bandwidth: str | None = None
    """A host's, one direction, like 3200Gbps. None: the chip's usual host."""
    host_storage: str | None = None
    """Bytes a host keeps its checkpoint in, like 8Ti. None: enough."""
    layout: str = "auto"
    """auto, or axes like tensor=8,stage=2; replicas fill the rest of the booking."""
    profile: str = "bf16"
    """A precision profile, or auto: the most exact that fits."""
    kv_format: str | None = None
    """Overrides the profile's keys and values."""
    rows: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Sequences at once in one replica. None: what the memory holds."""
    context_tokens: Annotated[int, Meta(ge=16)] = 8192
    """The longest request."""
    prompt_tokens: Annotated[int, Meta(ge=1)] = 2048
    """A mean request."""
    output_tokens: Size = 512
    chunk_tokens: Annotated[int, Meta(ge=16, le=16384)] = 512
    page_tokens: Annotated[int, Meta(ge=8, le=256)] | None = None
    """On one device. None: chosen."""
    ttft: str | None = None
    """Wanted time to the first token, like 200ms."""
    token_time: str | None = None
    """Wanted time between tokens of a stream, like 20ms."""
