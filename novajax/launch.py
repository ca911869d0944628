"""Serves a model over HTTP: the front end in this process, the engine in a child.

Many processes: `--processes=4 --mesh=tensor=4` starts four on this host; many hosts: start this on each, under Slurm, Kubernetes or
with --process_id, --process_count and --coordinator; the first one serves. `cluster.bootstrap` tells what is looked for.

The port is bound before anything is loaded, so /health and /ready tell how the start goes; a ready line with a command to
copy is printed when requests are welcome. SIGTERM drains: running requests finish, new ones get 503.

Examples:
  python -m novajax.launch --config=configs/nova-small.yaml
  python -m novajax.launch --model=/models/Llama-3.1-8B-Instruct --port=8000
  python -m novajax.launch --model=Qwen/Qwen2.5-0.5B-Instruct@main --host=0.0.0.0 --api_key_file=keys.txt
  python -m novajax.launch --config=configs/nova-small.yaml --processes=2 --devices_per_process=2 --mesh=tensor=2,data=2

Exit codes: 0 stopped by a signal after draining; 2 a flag, file or model is not usable, or the memory does not suffice.
"""

import asyncio
import os
import sys
import time
from typing import Any

import msgspec
from absl import app, flags

from novajax.cluster.child import EngineProcess
from novajax.cluster.quality import QualitySettings, QualityWatch, reference_config
from novajax.cluster.remotehost import attend
from novajax.core.config import EngineConfig
from novajax.core.errors import ConfigError, Unavailable
from novajax.core.heap import bound_arenas
from novajax.group import define_group_flags, read_group
from novajax.options import define_engine_flags, engine_config, read_config
from novajax.server.app import create_app
from novajax.server.serve import listen, serve
from novajax.server.settings import ServerSettings, read_keys, refuse_open_bind
from novajax.telemetry.logging import configure as configure_logging
from novajax.text.template import ChatTemplate
from novajax.text.tokenizer import Tokenizer, check_vocabulary
from novajax.weights.source import Source, resolve

define_engine_flags()
define_group_flags()
_HOST = flags.DEFINE_string("host", None, "address to bind (default 127.0.0.1); any other needs --api_key_file")
_PORT = flags.DEFINE_integer("port", None, "port to bind (default 8000; 0: any free one)", lower_bound=0, upper_bound=65535)
_KEYS = flags.DEFINE_string("api_key_file", None, "file with one API key a line")
_TEMPLATE = flags.DEFINE_string("chat_template", None, "Jinja file to use in place of the model's chat template")
_DRAIN_S = flags.DEFINE_float("drain_s", None, "seconds that running requests may go on after SIGTERM (default 30)", lower_bound=0)
_METRICS_OPEN = flags.DEFINE_bool("metrics_open", None, "serve /metrics without a key (loopback only)")
_QUALITY = flags.DEFINE_float(
    "quality_share", None, "share of answers scored again by an unquantized engine (default 0)", lower_bound=0, upper_bound=1
)
_JSON = flags.DEFINE_bool("json", False, "print the ready line as JSON on stdout")

NOT_STARTED = 2


def main(_: list[str]) -> int:
    bound_arenas(os.environ)
    configure_logging()
    try:
        file = read_config(flags.FLAGS)
        config = engine_config(flags.FLAGS, file)
        settings = server_settings(file.server)
        refuse_open_bind(settings)
        group = read_group(flags.FLAGS, file.cluster, os.environ)
        source = resolve(config.model)
        name = config.served_name or source.name
        config = msgspec.structs.replace(config, model=str(source.directory), served_name=name)
        settings = msgspec.structs.replace(settings, model_names=settings.model_names or (name,))
        if group.place.index:
            return asyncio.run(attend(group.follower(config)))
        quality = quality_settings(file.quality)
        engine = EngineProcess(config, group.settings, group.place, secret=group.secret)
        return asyncio.run(run(settings, source, engine, reference_engine(config, quality), quality))
    except ConfigError as error:
        print(f"novajax: {error.message}", file=sys.stderr)
        return NOT_STARTED


def server_settings(section: dict) -> ServerSettings:
    """Flags over the file's `server:` section. Raises ConfigError."""
    given = {"host": _HOST.value, "port": _PORT.value, "drain_s": _DRAIN_S.value, "metrics_open": _METRICS_OPEN.value}
    merged = section | {name: value for name, value in given.items() if value is not None}
    keys = _KEYS.value or merged.pop("api_key_file", None)
    try:
        settings = msgspec.convert(merged, ServerSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"server: {error}") from None
    return msgspec.structs.replace(settings, key_digests=read_keys(keys)) if keys else settings


def quality_settings(section: dict) -> QualitySettings:
    """The flag over the file's `quality:` section. Raises ConfigError."""
    try:
        return msgspec.convert(section | ({} if _QUALITY.value is None else {"share": _QUALITY.value}), QualitySettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"quality: {error}") from None


def reference_engine(config: EngineConfig, quality: QualitySettings) -> EngineProcess | None:
    """The more precise engine, where answers are to be scored again. Raises ConfigError if it would be the served one again."""
    if not quality.share:
        return None
    config = reference_config(config, quality)
    environment = os.environ | {"JAX_PLATFORMS": quality.platform} if quality.platform else {}
    return EngineProcess(msgspec.structs.replace(config, model=str(resolve(config.model).directory)), environment=environment)


async def run(
    settings: ServerSettings, source: Source, engine: EngineProcess, reference: EngineProcess | None, quality: QualitySettings
) -> int:
    """Front end and engine, until a signal. The exit code."""
    began_s = time.monotonic()
    listener = listen(settings)
    tokenizer = Tokenizer(source.directory)
    template = ChatTemplate(tokenizer, _TEMPLATE.value)
    watch = None if reference is None else QualityWatch(engine.backend, reference.backend, quality)
    app = create_app(watch or engine.backend, tokenizer, template, settings)
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(app, settings, listener=listener, stop=stop, signals=True, on_serving=port.set_result))
    engines = [each for each in (engine, reference) if each is not None]
    supervising = [asyncio.create_task(each.run()) for each in engines]
    if watch is not None:
        supervising.append(asyncio.create_task(watch.run()))
    announcing = asyncio.create_task(announce(engine, settings, tokenizer, await port, began_s, template.available))
    try:
        watched: set[asyncio.Task[Any]] = {serving, announcing, *supervising}
        while serving in watched:
            done, watched = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        return 0
    finally:
        stop.set()
        await serving
        for task in (announcing, *supervising):
            task.cancel()
        await asyncio.gather(announcing, *supervising, return_exceptions=True)
        await asyncio.gather(*(each.close() for each in engines))


async def announce(engine: EngineProcess, settings: ServerSettings, tokenizer: Tokenizer, port: int, began_s: float, chat: bool) -> None:
    """Prints the ready line once the engine is there. Raises ConfigError if its vocabulary is too small for the tokenizer."""
    try:
        card = await engine.backend.card()
    except Unavailable:
        return  # `engine.run` raises what happened
    check_vocabulary(tokenizer, card.vocab_size)
    stats = await engine.backend.stats()
    seconds = time.monotonic() - began_s
    url = f"http://{settings.host}:{port}"
    if _JSON.value:
        line = {"ready": True, "url": url, "model": card.id, "seconds": round(seconds, 3), "startup": stats.startup, "pid": stats.pid}
        print(msgspec.json.encode(line).decode(), flush=True)
        return
    phases = ", ".join(f"{name} {taken:.1f} s" for name, taken in stats.startup.items())
    print(f"start-up: {phases}", file=sys.stderr)
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.key_digests else ""
    path, body = ("completions", '"prompt": "Once upon a time"')
    if chat:
        path, body = ("chat/completions", '"messages": [{"role": "user", "content": "Tell me a story about a fox."}]')
    print(f"\nready in {seconds:.1f} s: {card.id} at {url}  ({'key needed' if key else 'no key needed on this machine'}; page: {url}/)")
    print(f"try: curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{{\"model\": \"{card.id}\", {body}}}'\n", flush=True)


if __name__ == "__main__":
    app.run(main)
