"""The socket and the life of the server: one owner per port, loops of both kinds, a drain that answers everyone."""

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvloop

from novajax.core.errors import ConfigError
from novajax.core.fake import FakeBackend
from novajax.server.app import create_app
from novajax.server.fake import ServedFake, fake_card
from novajax.server.jobs import priority_of
from novajax.server.serve import listen, serve
from novajax.server.settings import ServerSettings
from novajax.text.tokenizer import Tokenizer


def test_a_taken_port_is_an_error_not_a_second_server(served: ServedFake):
    with pytest.raises(ConfigError, match=str(served.port)):
        listen(ServerSettings(port=served.port))


def test_a_host_that_is_not_here_is_an_error():
    with pytest.raises(ConfigError, match="cannot listen"):
        listen(ServerSettings(host="203.0.113.1", port=0, key_digests=(b"x" * 32,)))


def test_connections_inherit_the_write_time_out():
    with listen(ServerSettings(port=0, write_timeout_s=7)) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000


def test_uvloop(tokenizer: Tokenizer):
    async def run() -> str:
        settings, stop, port = ServerSettings(port=0), asyncio.Event(), asyncio.get_running_loop().create_future()
        app = create_app(FakeBackend(fake_card(tokenizer)), tokenizer, None, settings)
        serving = asyncio.create_task(serve(app, settings, stop=stop, on_serving=port.set_result))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{await port}") as client:
            answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
        stop.set()
        await serving
        return answer.json()["choices"][0]["text"]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == "bcd"


def test_whole_replies_are_drained_too(tokenizer: Tokenizer):
    with ServedFake(tokenizer, FakeBackend(fake_card(tokenizer), step_s=0.02)) as running, ThreadPoolExecutor() as threads:
        body = {"prompt": "a", "max_tokens": 25}
        asked = threads.submit(httpx.post, running.url + "/v1/completions", json=body, timeout=60)
        while not running.backend.live and not asked.done():
            time.sleep(0.01)
        running.stop()
        assert len(asked.result().json()["choices"][0]["text"]) == 25
        running.join()


def test_a_server_that_was_stopped_frees_its_port(tokenizer: Tokenizer):
    with ServedFake(tokenizer) as first:
        port = first.port
        assert httpx.get(first.url + "/ready").status_code == 200
    end = time.monotonic() + 10
    while True:
        try:
            listen(ServerSettings(port=port)).close()
            return
        except ConfigError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_priorities():
    assert [priority_of(value) for value in (None, 0, -5, 3, "high", "low")] == ["medium", "medium", "high", "low", "high", "low"]
