import pytest
from hypothesis import given
from hypothesis import strategies as st

from novajax.core.errors import InvalidRequest
from novajax.text.stop import StopFinder, check_stops


def cut(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    finder, text = StopFinder(stops, include=include), ""
    for piece in pieces:
        new, stop = finder.push(piece)
        text += new
        if stop is not None:
            return text, stop
    return text + finder.flush(), None


def test_a_stop_string_across_pieces():
    assert cut(["abc #", "#", "# def"], ["###"]) == ("abc ", "###")
    assert cut(["abc #", "#", "# def"], ["###"], include=True) == ("abc ###", "###")
    assert cut(["ab", "aab", "c"], ["aabc"]) == ("ab", "aabc")


def test_what_only_looked_like_a_stop_string_comes_out():
    assert cut(["a#", "#b", "##"], ["###"]) == ("a##b##", None)


def test_text_is_held_back_only_as_far_as_needed():
    finder = StopFinder(["</s>"])
    assert finder.push("hello <") == ("hello ", None)
    assert finder.push("b> ") == ("<b> ", None)
    assert finder.push("</") == ("", None)
    assert finder.flush() == "</"


def test_the_first_complete_stop_string_wins():
    assert cut(["abcd"], ["bcd", "c"]) == ("ab", "c")
    assert cut(["xabc"], ["bc", "abc"]) == ("x", "abc")


def test_text_before_min_tokens_is_not_searched():
    finder = StopFinder(["ab"])
    assert finder.unsearched("a") == "a"
    assert finder.push("b") == ("b", None)


@given(st.text("ab#e\u0301", max_size=40), st.lists(st.text("ab#\u0301", min_size=1, max_size=4), max_size=4), st.booleans(), st.data())
def test_the_cutting_of_the_text_does_not_matter(text: str, stops: list[str], include: bool, data: st.DataObject):
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *borders], [*borders, len(text)], strict=True)]
    found = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    expected: tuple[str, str | None] = (text, None)
    if found:
        end, start, stop = min(found)
        expected = (text[: end if include else start], stop)
    assert cut(pieces, stops, include) == expected


@pytest.mark.parametrize("stops", [["a"] * 5, [""], ["é" * 129], ["x" * 1_000_000]])
def test_caps(stops: list[str]):
    with pytest.raises(InvalidRequest) as refused:
        check_stops(stops)
    assert refused.value.param == "stop"


def test_stops_within_the_caps_pass():
    assert check_stops(["é" * 128, "\n\n"]) == ("é" * 128, "\n\n")
