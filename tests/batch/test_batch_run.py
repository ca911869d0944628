"""A whole batch over the fake backend: the shape of answers, lines that fail alone, and resuming."""

import asyncio
import json

import pytest
from batch_world import World, completion_line

from novajax.core.errors import ConfigError, Conflict, Unavailable
from novajax.offline import output as output_module
from novajax.offline.output import OutputStopped
from novajax.offline.state import state_path
from novajax.text.fake import SIZE


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def expected_text(world: World, prompt: str, tokens: int) -> str:
    last = world.tokenizer.encode(prompt)[-1]
    return world.tokenizer.decode([(last + 1 + i) % SIZE for i in range(tokens)])


def test_every_form_of_line_is_answered(world):
    chat = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    world.write(
        completion_line(1),
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"prompt": "plain", "max_tokens": 2},
        {"messages": chat["messages"], "max_tokens": 2, "custom_id": "named"},
        {"prompt": [10, 11, 12], "max_tokens": 2},
        completion_line(6, n=2, logprobs=1),
    )
    summary = world.run()
    found = world.by_line()
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert (summary.succeeded, summary.failed, summary.lines) == (6, 0, 6)
    for record in found.values():
        assert list(record) == ["id", "line", "custom_id", "response", "error"]
        assert record["error"] is None
        assert record["response"]["status_code"] == 200
        assert record["response"]["request_id"] == record["id"]
    assert [found[line]["custom_id"] for line in range(1, 7)] == ["id-1", "chat", None, "named", None, "id-6"]
    bodies = {line: found[line]["response"]["body"] for line in found}
    assert bodies[1]["object"] == "text_completion"
    assert bodies[1]["choices"][0]["text"] == expected_text(world, "line 1", 4)
    assert bodies[2]["object"] == "chat.completion"
    assert bodies[2]["choices"][0]["message"]["role"] == "assistant"
    assert len(bodies[6]["choices"]) == 2
    assert summary.prompt_tokens == sum(body["usage"]["prompt_tokens"] for body in bodies.values())
    assert summary.output_tokens == sum(body["usage"]["completion_tokens"] for body in bodies.values())


BAD_LINES = [
    ("truncated JSON", b'{"custom_id":"a","method":"POST"', "invalid_json"),
    ("not JSON", b"hello", "invalid_json"),
    ("not an object", b"[1, 2]", "invalid_line"),
    ("empty", b"", "empty_line"),
    ("blank", b"   ", "empty_line"),
    ("bad UTF-8", b'{"prompt":"\xff\xfe"}', "invalid_utf8"),
    ("raw NUL", b'{"prompt":"\0"}', "invalid_json"),
    ("lone surrogate in the id", b'{"custom_id":"\\ud800","prompt":"x"}', "invalid_json"),
    ("lone surrogate", b'{"prompt":"\\ud800","max_tokens":1}', "invalid_json"),
    ("too long", b'{"prompt":"' + b"a" * 5000 + b'"}', "line_too_long"),
    ("nested too deeply", b'{"x":' + b"[" * 2000 + b"]" * 2000 + b"}", "invalid_json"),
    ("neither form", {"custom_id": "a"}, "invalid_line"),
    ("both plain forms", {"prompt": "x", "messages": []}, "invalid_line"),
    ("url that climbs", completion_line(1) | {"url": "../../v1/completions"}, "invalid_url"),
    ("another url", completion_line(1) | {"url": "/v1/embeddings"}, "invalid_url"),
    ("absolute url", completion_line(1) | {"url": "http://169.254.169.254/v1/completions"}, "invalid_url"),
    ("url of another type", completion_line(1) | {"url": 7}, "invalid_url"),
    ("file_url", {"custom_id": "a", "method": "POST", "file_url": "file:///etc/passwd"}, "invalid_url"),
    ("method", completion_line(1) | {"method": "GET"}, "invalid_method"),
    ("no custom_id", {"method": "POST", "url": "/v1/completions", "body": {}}, "missing_custom_id"),
    ("custom_id of another type", completion_line(1) | {"custom_id": 5}, "invalid_custom_id"),
    ("custom_id too long", completion_line(1) | {"custom_id": "x" * 600}, "invalid_custom_id"),
    ("no body", {"custom_id": "a", "method": "POST", "url": "/v1/completions"}, "missing_body"),
    ("duplicate custom_id", completion_line(100), "duplicate_custom_id"),
]
REFUSED_BODIES = [
    ("body not an object", completion_line(1) | {"body": [1]}, 400),
    ("empty body", completion_line(1) | {"body": {}}, 400),
    ("n", completion_line(1, n=0), 400),
    ("huge n", completion_line(1, n=10**30), 400),
    ("max_tokens", completion_line(1, max_tokens=-1), 400),
    ("beyond the context", completion_line(1, max_tokens=10**6), 400),
    ("temperature", completion_line(1, temperature="hot"), 400),
    ("empty prompt", completion_line(1, prompt=""), 400),
    ("token outside the vocabulary", completion_line(1, prompt=[SIZE]), 400),
    ("another model", completion_line(1, model="other"), 404),
    ("unsupported feature", completion_line(1, response_format={"type": "json_object"}), 400),
    ("stream", completion_line(1, stream=True), 400),
]


@pytest.mark.parametrize(("bad", "code"), [row[1:] for row in BAD_LINES], ids=[row[0] for row in BAD_LINES])
def test_a_bad_line_fails_alone_with_its_number(world, bad, code):
    world.write(completion_line(100), completion_line(101), bad, completion_line(102))
    summary = world.run(max_line_bytes=4096)
    found = world.by_line()
    assert sorted(found) == [1, 2, 3, 4]
    assert (summary.succeeded, summary.failed) == (3, 1)
    assert found[3]["response"] is None
    assert found[3]["error"]["code"] == code
    assert found[3]["error"]["line"] == 3
    assert found[3]["error"]["message"].startswith("line 3: ")
    assert all(found[line]["response"]["status_code"] == 200 for line in (1, 2, 4))


@pytest.mark.parametrize(("bad", "status"), [row[1:] for row in REFUSED_BODIES], ids=[row[0] for row in REFUSED_BODIES])
def test_a_refused_body_has_the_servers_own_error(world, bad, status):
    world.write(completion_line(100), bad, completion_line(102))
    world.run(max_line_bytes=8192)
    found = world.by_line()
    assert found[2]["response"]["status_code"] == status
    assert set(found[2]["response"]["body"]["error"]) == {"message", "type", "param", "code"}
    assert found[2]["error"] is None
    assert [found[line]["response"]["status_code"] for line in (1, 3)] == [200, 200]


def test_a_request_that_fails_inside_the_engine_fails_alone(world):
    world.write(completion_line(1), {"prompt": [7], "max_tokens": 2}, completion_line(3))
    world.backend._fail_on = 7
    asyncio.run(world.run_async())
    found = world.by_line()
    assert [found[line]["response"]["status_code"] for line in (1, 2, 3)] == [200, 400, 200]


def test_an_empty_input_gives_an_empty_output(world):
    world.write()
    assert world.run().lines == 0
    assert world.records() == []


def test_a_finished_batch_is_not_asked_again(world):
    world.write(*(completion_line(i) for i in range(1, 21)))
    world.run()
    before = world.output.read_bytes()
    summary = world.run()
    assert (summary.resumed, summary.succeeded, world.backend.generated) == (20, 0, 0)
    assert world.output.read_bytes() == before


@pytest.mark.parametrize("state_kept", [True, False])
def test_a_cancelled_run_resumes_and_asks_only_what_is_missing(world, state_kept):
    world.write(*(completion_line(i) for i in range(1, 61)))

    async def cancelled() -> None:
        task = asyncio.create_task(world.run_async(max_in_flight=4))
        await world.generated(100)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    world.backend._step_s = 0.001
    asyncio.run(cancelled())
    assert not world.backend.live
    finished = len(world.records())
    assert 0 < finished < 60
    if not state_kept:
        state_path(world.output).unlink()
    summary = world.run()
    assert (summary.resumed, summary.succeeded) == (finished, 60 - finished)
    assert world.backend.generated == 4 * (60 - finished)
    assert sorted(world.by_line()) == list(range(1, 61))


def test_as_many_lines_are_in_flight_as_asked_for_and_no_more(world):
    world.write(*(completion_line(i) for i in range(1, 101)))
    seen = []

    async def watched() -> None:
        task = asyncio.create_task(world.run_async(max_in_flight=7))
        while not task.done():
            seen.append(len(world.backend.live))
            await asyncio.sleep(0.001)
        await task

    world.backend._step_s = 0.002
    asyncio.run(watched())
    assert max(seen) == 7


def test_a_full_queue_is_asked_again(world):
    world.write(*(completion_line(i) for i in range(1, 31)))
    summary = world.run(max_waiting=2, max_in_flight=6)
    assert summary.succeeded == 30


def test_a_failing_engine_stops_the_run_and_loses_nothing(world):
    world.write(*(completion_line(i) for i in range(1, 41)))

    async def failing() -> None:
        task = asyncio.create_task(world.run_async(max_in_flight=4))
        await world.generated(40)
        world.backend.phase = "failed"
        with pytest.raises(Unavailable):
            await task

    world.backend._step_s = 0.001
    asyncio.run(failing())
    finished = len(world.records())
    assert 0 < finished < 40
    assert all(record["response"]["status_code"] == 200 for record in world.records())
    assert world.run().resumed == finished
    assert sorted(world.by_line()) == list(range(1, 41))


def test_a_full_disk_stops_the_run_with_whole_records_only(world, monkeypatch):
    world.write(*(completion_line(i) for i in range(1, 21)))
    real_write, room = output_module.os.write, [3000]

    def write(fd, data):
        count = min(len(data), room[0])
        if not count:
            raise OSError(28, "No space left on device")
        room[0] -= count
        return real_write(fd, data[:count])

    monkeypatch.setattr(output_module.os, "write", write)
    with pytest.raises(OutputStopped, match="No space left"):
        world.run()
    finished = len(world.records())
    assert 0 < finished < 20
    monkeypatch.undo()
    assert world.run().resumed == finished
    assert sorted(world.by_line()) == list(range(1, 21))


def test_a_changed_input_is_refused(world):
    world.write(completion_line(1), completion_line(2))
    world.run()
    before = world.output.read_bytes()
    world.write(completion_line(1), completion_line(3))
    with pytest.raises(Conflict, match="the input changed"):
        world.run()
    state_path(world.output).unlink()
    with pytest.raises(Conflict, match="another input or model"):
        world.run()
    assert world.output.read_bytes() == before


def test_another_model_is_refused(world):
    world.write(completion_line(1))
    world.run()
    with pytest.raises(Conflict, match="another model"):
        world.run(digest="e" * 64)


def test_an_input_that_changes_under_the_run_is_noticed(world):
    world.write(*(completion_line(i) for i in range(1, 21)))

    async def changing() -> None:
        task = asyncio.create_task(world.run_async(max_in_flight=2))
        await world.generated(10)
        world.append(b"{}\n")
        with pytest.raises(Conflict, match="changed while it was read"):
            await task

    world.backend._step_s = 0.001
    asyncio.run(changing())


def test_input_and_output_may_not_be_one_file(world):
    world.write(completion_line(1))
    world.output = world.input
    before = world.input.read_bytes()
    with pytest.raises((Conflict, ConfigError)):
        world.run()
    assert world.input.read_bytes() == before


def test_ordered_output_is_in_the_order_of_the_input(world):
    lengths = [8, 1, 6, 2, 5, 3, 7, 4]
    world.write(*(completion_line(i, max_tokens=tokens) for i, tokens in enumerate(lengths, 1)))
    world.run(max_in_flight=4, step_s=0.001)
    assert [record["line"] for record in world.records()] != list(range(1, 9))
    world.run(ordered=True)
    assert [record["line"] for record in world.records()] == list(range(1, 9))
    assert world.run().resumed == 8


def test_records_hold_no_bytes_of_a_bad_line(world):
    world.write(b'{"custom_id": "a", "prompt": "SECRET', json.dumps({"url": "SECRET", "custom_id": "b"}).encode())
    world.run()
    assert b"SECRET" not in world.output.read_bytes()
