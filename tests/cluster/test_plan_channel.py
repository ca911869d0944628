"""The plan channel, side by side in one process: who is let in, which plans are run, and who is named when something is off."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest

from novajax.cluster import plans
from novajax.cluster.channel import ChannelError
from novajax.cluster.fake import FakeExecutor, Misbehaviour
from novajax.cluster.follower import Follower, join, present
from novajax.cluster.leader import PURPOSE, Gathering, GroupFault, LeadingRunner
from novajax.cluster.plans import Disagree, Plan, Present, ToLeader
from novajax.cluster.preflight import Facts, differences
from novajax.cluster.progress import Tally
from novajax.cluster.secure import Session, Unauthenticated
from novajax.cluster.settings import Assignment, ClusterSettings, Fault
from novajax.cluster.wire import Wire, accept, connect, listen
from novajax.core.config import EngineConfig
from novajax.core.errors import ConfigError
from novajax.scheduler.plan import Draw, PrefillRow, StepPlan

SECRET = b"0123456789abcdef0123456789abcdef"
FACTS = Facts(host="a", versions={"jax": "0.11.2"}, clock_s=0.0, config="c", weights="w")


def assignment(rank: int = 0, port: int = 0, epoch: int = 1, secret: bytes = SECRET, **settings: Any) -> Assignment:
    wanted: dict[str, Any] = {"gather_s": 5.0, "stall_s": 1.0}
    told = ClusterSettings(**(wanted | settings))
    config = EngineConfig(model="fake")
    return Assignment(config=config, settings=told, epoch=epoch, rank=rank, ranks=2, secret=secret, plans=f"127.0.0.1:{port}")


def plan(number: int) -> StepPlan:
    row = PrefillRow(0, 0, (1, 2, number), (0,), True, False, -1, Draw(temperature=0.0), False)
    return StepPlan(number, (), (row,), (), 0, (1, 64))


@contextmanager
def wires() -> Iterator[tuple[Wire, Wire]]:
    """(the leader's end, the follower's end)."""
    listener = listen()
    found: list[Wire] = []

    def let_in() -> None:
        found.append(accept(listener, SECRET, PURPOSE, ToLeader, deadline_s=time.monotonic() + 5, send_s=1.0))

    thread = threading.Thread(target=let_in)
    thread.start()
    theirs = join(assignment(1, listener.getsockname()[1]))
    thread.join()
    try:
        yield found[0], theirs
    finally:
        for wire in (*found, theirs):
            wire.close()
        listener.close()


def lead(wire: Wire, faults: list[Fault], **settings: Any) -> LeadingRunner:
    return LeadingRunner(FakeExecutor(0, 0.0, Misbehaviour()), {1: wire}, assignment(**settings), Tally(), faults.append)


def until(what, wait_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + wait_s
    while not what():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


def test_plans_run_on_both_sides_and_end_in_order():
    with wires() as (mine, theirs):
        tally, faults = Tally(), []
        follower = Follower(FakeExecutor(1, 0.0, Misbehaviour()), theirs, assignment(1), tally)
        thread = threading.Thread(target=follower.run)
        thread.start()
        leader = lead(mine, faults)
        for number in range(50):
            leader.collect(leader.dispatch(plan(number)))
        until(lambda: tally.completed == 50)
        assert not tally.busy()
        leader.close()
        thread.join(5)
        assert not thread.is_alive()
        assert not faults


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": b"\xcd\x34" * 8}, "step 0: rank 1 has batch digest"),
        ({"epoch": 7}, "rank 1 is of epoch 1, the plan of epoch 7"),
        ({"number": 3}, "rank 1 expected step 0"),
        ({"body": b"\xc1"}, "cannot read the plan"),
        ({"body": msgspec.msgpack.encode(plan(9))}, "instead of"),
    ],
)
def test_a_plan_that_is_not_the_leaders_next_is_refused_by_name(change: dict, words: str):
    with wires() as (mine, theirs):
        follower = Follower(FakeExecutor(1, 0.0, Misbehaviour()), theirs, assignment(1), Tally())
        mine.send(msgspec.structs.replace(plans.packed(1, plan(0)), **change))
        with pytest.raises(GroupFault) as caught:
            follower.run()
        assert words in caught.value.message
        said = mine.receive(5.0)
        assert isinstance(said, Disagree)
        assert words in said.message


def test_the_digest_of_the_wire_is_the_plans_own():
    packed = plans.packed(1, plan(4))
    assert packed.digest == plan(4).digest()
    assert msgspec.msgpack.decode(packed.body, type=StepPlan) == plan(4)


def test_a_follower_that_draws_other_tokens_ends_the_group():
    with wires() as (mine, theirs):
        faults: list[Fault] = []
        follower = Follower(FakeExecutor(1, 0.0, Misbehaviour(1, 2, "token")), theirs, assignment(1), Tally())

        def run() -> None:
            with suppress(ChannelError):
                follower.run()

        threading.Thread(target=run, daemon=True).start()
        leader = lead(mine, faults)
        for number in range(3):
            leader.collect(leader.dispatch(plan(number)))
        until(lambda: faults)
        assert faults[0].message.startswith("step 2: rank 1 drew tokens")
        with pytest.raises(GroupFault, match="step 2"):
            leader.dispatch(plan(3))
        assert len(faults) == 1


@pytest.mark.parametrize(("settings", "words"), [({"behind_plans": 5}, "plans owed"), ({"stall_s": 0.1}, "is behind")])
def test_a_follower_that_falls_behind_is_named(settings: dict, words: str):
    with wires() as (mine, _):
        faults: list[Fault] = []
        leader = lead(mine, faults, **settings)
        with pytest.raises(GroupFault, match=words) as caught:
            for number in range(100):
                leader.collect(leader.dispatch(plan(number)))
                time.sleep(0.02)
        assert "rank 1" in caught.value.message
        assert len(faults) == 1


def test_a_lost_follower_is_named():
    with wires() as (mine, theirs):
        faults: list[Fault] = []
        leader = lead(mine, faults)
        theirs.close()
        until(lambda: faults)
        assert "rank 1 left the plan channel" in faults[0].message
        with pytest.raises(GroupFault):
            leader.dispatch(plan(0))


def test_who_does_not_know_the_secret_is_turned_away_and_told_nothing():
    listener = listen()
    gathering = Gathering(listener, assignment(gather_s=1.0))
    errors: list[Exception] = []

    def intrude() -> None:
        try:
            join(assignment(1, listener.getsockname()[1], secret=b"x" * 32))
        except ChannelError as error:
            errors.append(error)

    thread = threading.Thread(target=intrude)
    thread.start()
    with pytest.raises(ChannelError, match="rank 1 did not come"):
        gathering.gather(lambda: FACTS)
    thread.join()
    assert errors


def test_a_server_without_the_secret_is_refused():
    listener = listen()

    def pretend() -> None:
        sock, _ = listener.accept()
        sock.sendall(b"n" * 32)
        sock.recv(64)
        sock.sendall(b"p" * 32)

    threading.Thread(target=pretend, daemon=True).start()
    address = ("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(Unauthenticated):
        connect(address, SECRET, PURPOSE, ToLeader, deadline_s=time.monotonic() + 5, send_s=1.0)


def test_a_rank_of_an_old_epoch_does_not_get_in():
    listener = listen()
    port = listener.getsockname()[1]
    gathering = Gathering(listener, assignment(gather_s=1.0))

    def come(epoch: int) -> None:
        join(assignment(1, port)).send(Present(1, epoch, FACTS))

    thread = threading.Thread(target=come, args=(0,))
    thread.start()
    with pytest.raises(ChannelError, match="rank 1 did not come"):
        gathering.gather(lambda: FACTS)
    thread.join()
    assert not gathering.wires


def test_frames_are_sealed_in_order_and_bounded():
    mine, theirs = Session(b"k" * 32, "server", "client", 100), Session(b"k" * 32, "client", "server", 100)
    first, second = mine.seal(b"one"), mine.seal(b"two")
    with pytest.raises(Unauthenticated):
        theirs.open(second[:20], second[20:])  # the first was dropped
    assert theirs.open(first[:20], first[20:]) == b"one"
    with pytest.raises(Unauthenticated):
        theirs.open(first[:20], first[20:])  # repeated
    with pytest.raises(Unauthenticated):
        theirs.open(second[:20], b"owt")  # altered
    with pytest.raises(Unauthenticated):
        mine.open(second[:20], second[20:])  # reflected
    with pytest.raises(ChannelError, match="cap"):
        mine.seal(b"x" * 101)
    with pytest.raises(ChannelError, match="cap"):
        theirs.length(b"\xff" * 20)


def test_an_oversized_frame_ends_the_connection():
    with wires() as (mine, theirs):
        theirs._socket.sendall(b"\xff" * 64)
        with pytest.raises(ChannelError, match="cap"):
            mine.receive(5.0)


def test_the_preflight_says_in_one_line_what_differs():
    other = msgspec.structs.replace(
        FACTS, host="b", versions={"jax": "0.11.1", "flax": "1"}, weights="v", config="d", clock_s=99.0, devices=1, device_kind="H100"
    )
    lines = differences({0: FACTS, 3: other})
    assert "rank 3 (b) has jax 0.11.1, rank 0 has 0.11.2" in lines
    assert "rank 3 (b) has flax 1, rank 0 has none" in lines
    assert "rank 3 (b) sees weights v, rank 0 w" in lines
    assert "the clock of rank 3 (b) is +99 s from rank 0's" in lines
    assert len(lines) == 6
    assert not differences({0: FACTS, 1: FACTS})


def test_a_group_that_differs_is_refused_by_the_leader():
    listener = listen()
    port = listener.getsockname()[1]
    told: list[Exception] = []

    def come() -> None:
        wire = join(assignment(1, port))
        try:
            present(wire, assignment(1), msgspec.structs.replace(FACTS, weights="v", clock_s=time.time()), 5.0)
        except ConfigError as error:
            told.append(error)

    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(ConfigError, match=r"rank 1 .* sees weights v, rank 0 w"):
        Gathering(listener, assignment()).gather(lambda: FACTS)
    thread.join(5)
    assert told


def test_plan_frames_carry_their_type():
    assert isinstance(plans.packed(2, plan(1)), Plan)
