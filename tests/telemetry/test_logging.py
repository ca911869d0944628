import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from novajax.core.errors import ConfigError
from novajax.telemetry.logging import REDACTED, configure


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_json_where_there_is_no_terminal():
    out = io.StringIO()
    configure(stream=out)
    structlog.get_logger("novajax.server").info("ready", port=8000)
    logging.getLogger("novajax.engine").warning("step %d", 3)
    ours, theirs = lines(out)
    assert (ours["event"], ours["level"], ours["logger"], ours["port"]) == ("ready", "info", "novajax.server", 8000)
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("step 3", "warning", "novajax.engine")
    assert ours["timestamp"].endswith("Z")


def test_text_on_a_terminal():
    out = Terminal()
    configure(stream=out, colors=False)
    structlog.get_logger("x").info("ready", port=8000)
    assert "[info     ] ready" in out.getvalue()
    assert "port=8000" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_levels():
    out = io.StringIO()
    configure("warning", stream=out)
    for logger in (structlog.get_logger("x"), logging.getLogger("x")):
        logger.info("no")
        logger.error("yes")
    assert [line["event"] for line in lines(out)] == ["yes", "yes"]
    with pytest.raises(ConfigError, match="loud"):
        configure("loud")


def test_keys_never_appear():
    for stream in (io.StringIO(), Terminal()):
        configure(stream=stream, colors=False)
        log = structlog.get_logger("x")
        log.info("with Bearer sk-1", authorization="sk-2", headers={"Authorization": "Bearer sk-3", "X-API-Key": "sk-4"}, raw=b"Basic sk-5")
        logging.getLogger("y").info("header %s", "Bearer sk-6")
        try:
            raise RuntimeError("got Bearer sk-7")
        except RuntimeError:
            log.exception("failed")
            logging.getLogger("y").exception("failed")
        assert "sk-" not in stream.getvalue()
        assert stream.getvalue().count(REDACTED) >= 7


def test_what_users_wrote_appears_only_on_request():
    out = io.StringIO()
    configure(stream=out)
    structlog.get_logger("x").info("request", prompt="my secret", messages=[{"content": "my secret"}])
    assert "my secret" not in out.getvalue()
    configure(stream=out, log_prompts=True)
    structlog.get_logger("x").info("request", prompt="my secret")
    assert lines(out)[-1]["prompt"] == "my secret"


@pytest.mark.parametrize("terminal", [True, False])
def test_values_cannot_fake_a_line(terminal: bool):
    out = Terminal() if terminal else io.StringIO()
    configure(stream=out, colors=False)
    structlog.get_logger("x").info("user\n2026 [info] fake", id="a\r\nb\x1b[2J\u2028")
    logging.getLogger("y").info("user %s", "\nfake")
    assert len(out.getvalue().splitlines()) == 2
    assert "\x1b" not in out.getvalue()


def test_configuring_twice_does_not_double_lines():
    out = io.StringIO()
    configure(stream=out)
    configure(stream=out)
    logging.getLogger("y").info("once")
    assert len(lines(out)) == 1
