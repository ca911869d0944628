"""Where this launch stands among the hosts of its group: from flags, or from what the launcher left in the environment.

The order is: flags; LeaderWorkerSet; Kubernetes Job or JobSet; Slurm; Open MPI; else alone. The first that speaks is asked for
everything; flags may add what it does not know, and may not contradict it. Pure: the environment is an argument.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from novajax.cluster.secure import SHORTEST_SECRET_BYTES
from novajax.cluster.settings import Place
from novajax.cluster.wire import split_address
from novajax.core.errors import ConfigError

DEFAULT_PORT = 7791
"""Of the head's supervisor, when the launcher names only a host."""
MAX_HOSTS = 4096

type Environment = Mapping[str, str]


class PlaceFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What the user said; None where nothing."""

    process_id: int | None = None
    process_count: int | None = None
    coordinator: str | None = None


class _Found(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    index: int | None = None
    count: int | None = None
    head: str = ""
    """host or host:port."""
    port: int = DEFAULT_PORT


def find_group(environment: Environment, flags: PlaceFlags = PlaceFlags()) -> Place:
    """This launch's place. Raises ConfigError, naming the variables, for numbers that are missing, wrong or contradict each other."""
    found = next((place for look in _SOURCES if (place := look(environment)) is not None), _Found(source="flags"))
    if flags.process_id is not None and flags.process_count is not None:
        found = _Found(source="flags", head=found.head, port=found.port)  # both numbers: the launcher is not asked
    index = _agree("--process_id", flags.process_id, found.index, found.source)
    count = _agree("--process_count", flags.process_count, found.count, found.source)
    coordinator = flags.coordinator or found.head
    if index is None and count is None:
        if flags.coordinator:
            raise ConfigError("--coordinator was given without --process_id and --process_count", param="process_id")
        return Place()
    if index is None or count is None:
        missing = "--process_id" if index is None else "--process_count"
        raise ConfigError(f"{found.source} does not tell all of a process's place: {missing} is missing", param=missing.lstrip("-"))
    if not 0 <= index < count:
        raise ConfigError(f"{found.source}: process {index} of {count} does not exist: they count from 0", param="process_id")
    if count > MAX_HOSTS:
        raise ConfigError(f"{found.source}: {count} processes exceed the limit of {MAX_HOSTS}", param="process_count")
    if count == 1:
        return Place(source=found.source)
    if not coordinator:
        raise ConfigError(f"{found.source} does not tell where process 0 is: give --coordinator=host:port", param="coordinator")
    return Place(index=index, count=count, coordinator=_address(coordinator, found.port), source=found.source)


def read_secret(path: str | None, environment: Environment) -> bytes:
    """The group's shared secret, from a file or NOVAJAX_SECRET. Raises ConfigError if there is none or a short one."""
    try:
        secret = environment.get("NOVAJAX_SECRET", "").encode() if path is None else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"the secret file cannot be read: {error}", param="secret_file") from None
    if len(secret := secret.strip()) < SHORTEST_SECRET_BYTES:
        raise ConfigError(
            f"a group of several hosts needs a shared secret of at least {SHORTEST_SECRET_BYTES} bytes: "
            "give --secret_file, or the variable NOVAJAX_SECRET",
            param="secret_file",
        )
    return secret


def expand_nodelist(text: str) -> list[str]:
    """Slurm's 'gpu[001-003,7],login,rack[1-2]n[1-2]' as host names, in its order. Raises ConfigError."""
    names: list[str] = []
    for part in _split_outside_brackets(text):
        names += _expand(part)
        if len(names) > MAX_HOSTS:
            raise ConfigError(f"a node list names more than {MAX_HOSTS} hosts")
    return names


def _expand(part: str) -> list[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]+)\](.*)", part)
    if match is None:
        if not part or "[" in part or "]" in part:
            raise ConfigError(f"the node list part {part!r} is not understood")
        return [part]
    before, inside, after = match.groups()
    rests = _expand(after) if after else [""]
    names: list[str] = []
    for item in inside.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
        if ends is None:
            raise ConfigError(f"the node list range {item!r} is not understood")
        first, last = ends[1], ends[2] or ends[1]
        if not 0 <= int(last) - int(first) <= MAX_HOSTS:
            raise ConfigError(f"the node list range {item!r} is empty or too long")
        names += [f"{before}{number:0{len(first)}d}{rest}" for number in range(int(first), int(last) + 1) for rest in rests]
    return names


def _split_outside_brackets(text: str) -> list[str]:
    return [part for part in re.split(r",(?![^\[]*\])", text.strip())]


def _leader_worker_set(environment: Environment) -> _Found | None:
    if "LWS_LEADER_ADDRESS" not in environment:
        return None
    index, count = (_number(environment, name) for name in ("LWS_WORKER_INDEX", "LWS_GROUP_SIZE"))
    return _Found(source="LeaderWorkerSet", index=index, count=count, head=environment["LWS_LEADER_ADDRESS"])


def _kubernetes_job(environment: Environment) -> _Found | None:
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    return _Found(
        source="JobSet" if "JOBSET_COORDINATOR" in environment else "Kubernetes Job",
        index=_number(environment, "JOB_COMPLETION_INDEX"),
        count=_number(environment, "JOBSET_PROCESS_COUNT"),
        head=environment.get("JOBSET_COORDINATOR", ""),
    )


def _slurm(environment: Environment) -> _Found | None:
    if "SLURM_PROCID" not in environment:
        return None
    step, job = (_number(environment, name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    number = _number(environment, "SLURM_JOB_ID") or 0
    return _Found(
        source="Slurm",
        index=_number(environment, "SLURM_PROCID"),
        count=step if step is not None else job if job is not None else 1,
        head=expand_nodelist(nodes)[0] if nodes else "",
        port=20000 + number % 10000,  # two jobs on one node do not meet
    )


def _open_mpi(environment: Environment) -> _Found | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    index, count = (_number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "SIZE"))
    return _Found(source="Open MPI", index=index, count=count)


_SOURCES: tuple[Callable[[Environment], _Found | None], ...] = (_leader_worker_set, _kubernetes_job, _slurm, _open_mpi)


def _number(environment: Environment, name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not text.strip().isdecimal():
        raise ConfigError(f"{name}={text!r} is not a number")
    return int(text)


def _agree(name: str, flag: int | None, found: int | None, source: str) -> int | None:
    if flag is not None and found is not None and flag != found:
        raise ConfigError(f"{name}={flag} contradicts {source}, which says {found}", param=name.lstrip("-"))
    return found if flag is None else flag


def _address(text: str, port: int) -> str:
    """With the port, if none was named."""
    bare = text.count(":") != 1 and not text.startswith("[")  # a name or an IPv6 address
    if bare or text.endswith("]"):
        text = f"[{text}]:{port}" if ":" in text and not text.startswith("[") else f"{text}:{port}"
    split_address(text)
    return text
