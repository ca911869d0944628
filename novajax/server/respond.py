"""From a job to a reply: run it, whole or streaming, in one request's failure boundary.

Invariants: the pass through the gate is given back when the last byte is out or the client is gone; what fails before the
first token has its own status, what fails later is an error event; a client that leaves ends the work, streaming or not.
"""

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Request, Response

from novajax.core.errors import InvalidRequest, NovaError
from novajax.server.accounts import Account
from novajax.server.body import discard
from novajax.server.chat_writer import ChatWriter
from novajax.server.front import Front
from novajax.server.gate import Pass
from novajax.server.jobs import Job, at_once, check_piece, collect, sources
from novajax.server.schemas import Generation
from novajax.server.streams import EventStream, Pump
from novajax.server.text_writer import TextWriter
from novajax.text.alternative import Piece


def new_id(kind: str) -> str:
    """An id that nobody can guess: `chatcmpl-...`."""
    return f"{kind}-{secrets.token_hex(16)}"


async def enter(request: Request[Any, Any, Any], front: Front) -> Pass:
    """A pass for one sequence. Refused at once when the gate is full or closed: Overloaded, Unavailable."""
    try:
        return front.gate.enter()
    except NovaError:
        await discard(request, front.settings)
        raise


def json_reply(value: Any) -> Response[bytes]:
    return Response(msgspec.json.encode(value), media_type="application/json")


def check_streaming(body: Generation) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options are for stream=true", param="stream_options")


async def respond(front: Front, taken: Pass, job: Job, account: Account, writer: ChatWriter | TextWriter, *, stream: bool) -> Response[Any]:
    """Runs the job and writes its reply. A stream starts with the first piece, or after keep_alive_s of silence."""
    taken.grow(job.sequences - 1)
    if not stream:
        answers = await collect(front, job)
        for number, alternatives in enumerate(answers):
            for answer in alternatives:
                account.add(number, answer.index, len(answer.tokens), answer.usage, answer.timing)
        return json_reply(writer.reply(answers))

    def encode(number: int, piece: Piece) -> Sequence[bytes]:
        check_piece(front, piece)
        account.add(number, piece.index, len(piece.tokens), piece.usage, piece.timing)
        return list(writer.encode(number, piece))

    pump = Pump(sources(front, job), at_once=at_once(job))
    try:
        first = await pump.ready(front.settings.keep_alive_s)
        for _, piece in first or ():
            check_piece(front, piece)
    except BaseException:
        await pump.close()
        raise
    return EventStream(
        pump,
        first or [],
        encode=encode,
        last=writer.last,
        on_end=taken.keep().leave,
        keep_alive_s=front.settings.keep_alive_s,
        write_timeout_s=front.settings.write_timeout_s,
    )
