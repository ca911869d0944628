"""How many processes an engine has and where this one stands among them: flags that `launch` and `batch` share, over a
configuration's `cluster:` section and what a launcher left in the environment.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from absl import flags

from novajax.cluster.bootstrap import PlaceFlags, find_group, read_secret
from novajax.cluster.settings import ClusterSettings, Order, Place
from novajax.core.config import EngineConfig
from novajax.core.errors import ConfigError


class Group(msgspec.Struct, frozen=True):
    """The processes of one engine, as this launch is told of them."""

    settings: ClusterSettings
    place: Place
    secret: bytes | None
    """None: nobody outside this host takes part."""

    @property
    def alone(self) -> bool:
        """One process on one host."""
        return self.settings.processes == 1 and self.place.count == 1

    def follower(self, config: EngineConfig) -> Order:
        """What this launch does when it is not the first: `cluster.remotehost.attend` it."""
        return Order(config=config, settings=self.settings, place=self.place, secret=self.secret or b"", directory="")


def define_group_flags() -> None:
    """Declares the flags. Call once, at the import of an entry point or from its own function of that kind."""
    flags.DEFINE_integer("processes", None, "engine processes on this host (default 1)", lower_bound=1)
    flags.DEFINE_integer("devices_per_process", None, "virtual CPU devices of each process, without an accelerator", lower_bound=1)
    flags.DEFINE_float("stall_s", None, "seconds without a completed step, with work to do, until a restart (default 10)")
    flags.DEFINE_integer("process_id", None, "number of this launch among the group's, from 0; 0 leads", lower_bound=0)
    flags.DEFINE_integer("process_count", None, "launches in the group, one on each host", lower_bound=1)
    flags.DEFINE_string("coordinator", None, "host:port of launch 0, as the others reach it")
    flags.DEFINE_string("secret_file", None, "file with the group's shared secret; else the variable NOVAJAX_SECRET")


def read_group(values: flags.FlagValues, section: dict[str, Any], environment: Mapping[str, str]) -> Group:
    """Flags over the file's `cluster:` section. Raises ConfigError for what is not understood, contradicts itself or lacks a secret."""
    given = {name: values[name].value for name in ("processes", "devices_per_process", "stall_s")}
    try:
        settings = msgspec.convert(section | {name: value for name, value in given.items() if value is not None}, ClusterSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"cluster: {error}") from None
    told = PlaceFlags(**{name: values[name].value for name in PlaceFlags.__struct_fields__})
    place = find_group(environment, told)
    return Group(settings, place, read_secret(values["secret_file"].value, environment) if place.count > 1 else None)
