"""What leader and followers say to each other on the plan channel, in the order in which it happens.

follower                      leader
Present(facts)        ->
                      <-      Proceed | Refuse      the preflight before the devices are opened
Present(facts)        ->
                      <-      Proceed | Refuse      and after, now with the devices
Warm(digest)          ->
                      <-      Plan, Plan, ...       in number order
Done, Done, ...       ->                            as they complete
Disagree              ->                            instead, and the group ends
                      <-      End
"""

from hashlib import blake2b

import msgspec

from novajax.cluster.preflight import Facts
from novajax.engine.runner import Landed
from novajax.scheduler.plan import StepPlan

DIGEST_BYTES = 16


class Present(msgspec.Struct, frozen=True, tag="present"):
    rank: int
    epoch: int
    facts: Facts


class Proceed(msgspec.Struct, frozen=True, tag="proceed"):
    pass


class Refuse(msgspec.Struct, frozen=True, tag="refuse"):
    message: str


class Compiled(msgspec.Struct, frozen=True, tag="compiled"):
    """This rank's programs are there; none has run."""


class Warm(msgspec.Struct, frozen=True, tag="warm"):
    """This rank's programs are compiled and warm; the weights it holds slices of."""

    weights_digest: str


class Plan(msgspec.Struct, frozen=True, tag="plan"):
    epoch: int
    number: int
    digest: bytes
    body: bytes
    """The plan in msgpack: encoded once, sent to all."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    number: int
    digest: bytes
    """Of the plan that this rank ran."""
    drawn: bytes
    """Digest of the tokens it drew."""


class Disagree(msgspec.Struct, frozen=True, tag="disagree"):
    message: str


class End(msgspec.Struct, frozen=True, tag="end"):
    pass


ToLeader = Present | Compiled | Warm | Done | Disagree
ToFollower = Proceed | Refuse | Plan | End


def packed(epoch: int, plan: StepPlan) -> Plan:
    """The message that carries a plan."""
    body = msgspec.msgpack.encode(plan)
    return Plan(epoch, plan.number, digest(body), body)


def digest(body: bytes) -> bytes:
    """Equals StepPlan.digest() of the plan whose encoding is `body`."""
    return blake2b(body, digest_size=DIGEST_BYTES).digest()


def drawn(landed: Landed) -> bytes:
    """Digest of a step's tokens by slot."""
    return digest(msgspec.msgpack.encode(sorted((slot, result.tokens) for slot, result in landed.tokens.items())))
