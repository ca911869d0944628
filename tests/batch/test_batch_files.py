"""The two files under a batch: random access to hostile input, and an output that survives what befalls it."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from novajax.core.errors import ConfigError, Conflict
from novajax.offline.feed import Feed
from novajax.offline.index import LineIndex
from novajax.offline.output import BatchOutput
from novajax.offline.state import BatchState, load_state, save_state

RUN = "batch_0123456789abcdef"


def record(line: int, *, run: str = RUN, status: int = 200) -> bytes:
    return json.dumps({"id": f"{run}_{line}", "line": line, "response": {"status_code": status}}, separators=(",", ":")).encode()


def output(path: Path, lines: int = 5, synced_bytes: int | None = None, run: str = RUN) -> BatchOutput:
    return BatchOutput(path, run, lines, synced_bytes)


@given(data=st.lists(st.sampled_from([b"a", b"bb", b"\n", b"\r\n", b"", b"\xff\x00"]), max_size=40).map(b"".join))
def test_the_index_splits_as_the_line_ends_say(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("index") / "in"
    path.write_bytes(data)
    index = LineIndex(path, 1000)
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert [index[i].data for i in range(len(index))] == [line.rstrip(b"\r\n") for line in expected]
    assert [index[i].number for i in range(len(index))] == list(range(1, len(expected) + 1))
    assert index.size_bytes == len(data)
    index.close()


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b'\xef\xbb\xbf{"a":1}\n{}\n')
    assert LineIndex(path, 100)[0].data == b'{"a":1}'


def test_a_line_of_100_mb_is_never_held(tmp_path):
    path = tmp_path / "in"
    with open(path, "wb") as file:
        file.write(b'{"prompt":"x"}\n')
        for _ in range(100):
            file.write(b"a" * 2**20)
        file.write(b'\n{"prompt":"y"}\n')
    tracemalloc.start()
    index = LineIndex(path, 1 << 20)
    lines = [index[i] for i in range(3)]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [line.data for line in lines] == [b'{"prompt":"x"}', None, b'{"prompt":"y"}']
    assert lines[1].size_bytes == 100 * 2**20 + 1
    assert peak_bytes < 40 * 2**20


def test_repeated_ids_point_to_the_first_line_that_has_them(tmp_path):
    path = tmp_path / "in"
    ids = ["a", "b", "a", None, "c", "b", "a", None]
    path.write_text("".join(json.dumps({"custom_id": custom_id}) + "\n" for custom_id in ids))
    index = LineIndex(path, 1000)
    found = [index.earlier_line_with_id(number, custom_id) for number, custom_id in enumerate(ids, 1) if custom_id]
    assert found == [None, None, 1, None, 2, 1]


def test_an_input_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        LineIndex(tmp_path / "absent", 10)
    with pytest.raises(ConfigError):
        LineIndex(tmp_path, 10)


def test_what_was_finished_is_known_again(tmp_path):
    first = output(tmp_path / "out")
    first.append(3, record(3), failed=False)
    first.append(1, record(1, status=400), failed=True)
    first.close()
    again = output(tmp_path / "out")
    assert again.done.tolist() == [True, False, True, False, False]
    assert again.failed == 1


@pytest.mark.parametrize("kept", [1, 10, 30, len(record(2))])
def test_a_record_cut_by_a_kill_is_removed(tmp_path, kept):
    path = tmp_path / "out"
    whole = record(1) + b"\n"
    path.write_bytes(whole + record(2)[:kept])
    again = output(path)
    assert again.done.tolist() == [True, False, False, False, False]
    again.append(2, record(2), failed=False)
    assert path.read_bytes() == whole + record(2) + b"\n"


def test_damage_after_the_last_sync_is_removed_and_before_it_refused(tmp_path):
    path = tmp_path / "out"
    whole = record(1) + b"\n"
    path.write_bytes(whole + b"\0" * 50 + b"\n" + record(2) + b"\n")
    with pytest.raises(ConfigError, match="not a record"):
        output(path, synced_bytes=None)
    with pytest.raises(ConfigError, match="not a record"):
        output(path, synced_bytes=len(whole) + 1)
    assert output(path, synced_bytes=len(whole)).done.tolist() == [True, False, False, False, False]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"my precious notes", ConfigError),
        (b"my precious notes\n", ConfigError),
        (b'{"id":"x_1","line":1}\n', Conflict),
        (record(1, run="batch_of_another_input") + b"\n", Conflict),
        (record(1) + b"\n" + record(1) + b"\n", ConfigError),
        (record(6) + b"\n", ConfigError),
        (b'{"id":"batch_0123456789abcdef_1","line":2}\n', ConfigError),
    ],
)
def test_a_file_that_is_not_this_output_is_refused_and_left_alone(tmp_path, content, error):
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(error):
        output(path)
    assert path.read_bytes() == content


def test_a_second_writer_is_refused(tmp_path):
    first = output(tmp_path / "out")
    with pytest.raises(Conflict, match="another process"):
        output(tmp_path / "out")
    first.close()
    output(tmp_path / "out").close()


def test_sorting_is_by_line_and_changes_no_record(tmp_path):
    path = tmp_path / "out"
    one = output(path)
    for line in (4, 1, 5, 2, 3):
        one.append(line, record(line), failed=False)
    one.sort_by_line()
    assert path.read_bytes() == b"".join(record(line) + b"\n" for line in range(1, 6))
    assert list(tmp_path.iterdir()) == [path]


def test_an_unreadable_state_is_no_state(tmp_path):
    path = tmp_path / "state"
    assert load_state(path) is None
    state = BatchState(
        run_id=RUN, input_sha256="a", input_bytes=1, weights_digest="d", synced_bytes=0, first_open_line=1, iterator={"next_index": 0}
    )
    save_state(path, state)
    assert load_state(path) == state
    path.write_bytes(path.read_bytes()[:-5])
    assert load_state(path) is None


class TestFeed:
    def make(self, tmp_path: Path, lines: int) -> tuple[LineIndex, np.ndarray]:
        path = tmp_path / "in"
        path.write_text("".join(f"{i}\n" for i in range(lines)))
        return LineIndex(path, 100), np.zeros(lines, bool)

    def test_a_position_reads_every_unfinished_line_again_and_none_before_the_first(self, tmp_path):
        index, done = self.make(tmp_path, 20)
        feed = Feed(index, done)
        for _ in range(10):
            feed.take()
        for number in (1, 2, 4, 5, 9):
            done[number - 1] = True
            feed.finish(number)
        first_open, state = feed.position()
        assert first_open == 3
        again = Feed(index, done)
        assert again.fast_forward(first_open, state)
        numbers = []
        while (line := again.take()) is not None:
            numbers.append(line.number)
        assert numbers == [number for number in range(1, 21) if not done[number - 1]]

    def test_a_position_that_the_output_contradicts_is_not_used(self, tmp_path):
        index, done = self.make(tmp_path, 5)
        feed = Feed(index, done)
        for number in (1, 2, 3):
            feed.take()
            feed.finish(number)
        first_open, state = feed.position()
        again = Feed(index, done)  # the records were lost
        assert not again.fast_forward(first_open, state)
        line = again.take()
        assert line is not None
        assert line.number == 1
