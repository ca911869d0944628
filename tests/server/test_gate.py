import asyncio

import pytest

from novajax.core.errors import InvalidRequest, Overloaded, Unavailable
from novajax.server.gate import Gate


def test_a_pass_gives_back_what_it_took():
    gate = Gate(4, 1.0)
    with gate.enter() as taken:
        taken.grow(2)
        assert gate.inside == 3
    assert gate.inside == 0


def test_full():
    gate = Gate(3, 2.0)
    with gate.enter() as taken:
        taken.grow(1)
        with gate.enter():
            with pytest.raises(Overloaded) as caught:
                gate.enter()
            assert caught.value.retry_after_s == 2.0
            with pytest.raises(Overloaded):
                taken.grow(1)
        assert gate.inside == 2


def test_a_request_that_can_never_fit_is_no_overload():
    gate = Gate(3, 1.0)
    with gate.enter() as taken, pytest.raises(InvalidRequest, match="4"):
        taken.grow(3)
    assert gate.inside == 0


def test_a_kept_pass_outlives_its_block_but_not_an_error():
    gate = Gate(3, 1.0)
    with gate.enter() as taken:
        leave = taken.keep().leave
    assert gate.inside == 1
    leave()
    leave()
    assert gate.inside == 0
    with pytest.raises(ZeroDivisionError), gate.enter() as taken:
        taken.keep()
        raise ZeroDivisionError
    assert gate.inside == 0


def test_closed():
    async def run() -> None:
        gate = Gate(3, 1.0)
        inside = gate.enter()
        gate.close()
        with pytest.raises(Unavailable):
            gate.enter()
        assert not await gate.empty(0.01)
        asyncio.get_running_loop().call_later(0.01, inside.leave)
        assert await gate.empty(5)

    asyncio.run(run())
