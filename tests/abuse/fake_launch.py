"""A process that serves a FakeBackend in its main thread, as a launch would, until a signal: DIRECTORY STEP_S DRAIN_S. Says its port."""

import asyncio
import sys

from novajax.core.fake import FakeBackend
from novajax.server.app import create_app
from novajax.server.fake import fake_card
from novajax.server.serve import serve
from novajax.server.settings import ServerSettings
from novajax.text.tokenizer import Tokenizer


async def main(directory: str, step_s: float, drain_s: float) -> None:
    tokenizer = Tokenizer(directory)
    settings = ServerSettings(port=0, drain_s=drain_s)
    backend = FakeBackend(fake_card(tokenizer), step_s=step_s)
    await serve(create_app(backend, tokenizer, None, settings), settings, on_serving=lambda port: print(port, flush=True))
    assert not backend.live


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))
