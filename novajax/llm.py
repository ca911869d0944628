"""The Python API: a model in this process, prompts in, texts out.

llm = LLM("checkpoints/nova-small")
for output in llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=32)):
    print(output.text)
"""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import msgspec

from novajax.core.config import EngineConfig, parse_mesh
from novajax.core.errors import ConfigError, InvalidRequest, NovaError
from novajax.core.types import SamplingParams
from novajax.engine.build import open_engine
from novajax.text.completion import Completion, gather, generate
from novajax.text.template import ChatTemplate
from novajax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
MAX_WAITING = 100_000
"""Of the private engine's queue: nobody else is in it."""
PROMPTS_PER_ROW = 4
"""Prompts inside the engine at once, for each row: enough to keep it full."""


class LLM:
    """Owns an engine and a private event loop; `close` (or `with`) frees both. Not to be used from two threads at once."""

    def __init__(self, model: str, **options: Any):
        """`model` and `options` are the fields of `core.config.EngineConfig`; `mesh` may be "tensor=2,stage=2". Raises ConfigError for
        what is not understood."""
        if "mesh" in options:
            options["mesh"] = msgspec.to_builtins(parse_mesh(options["mesh"]))
        try:
            config = msgspec.convert({"model": model} | options, EngineConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(str(error)) from None
        self._runner = asyncio.Runner()
        self._engine = open_engine(msgspec.structs.replace(config, max_waiting=MAX_WAITING))
        self._at_once = PROMPTS_PER_ROW * config.max_rows
        self.card = self._runner.run(self._engine.card())
        self.tokenizer = Tokenizer(self.card.directory)
        self._template = ChatTemplate(self.tokenizer)
        self._numbers = itertools.count()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """One Completion for each prompt (n for each when sampling.n > 1), in order of the prompts.

        A prompt is a text or a list of token ids. `sampling` is shared, or one for each prompt; None: the model's own defaults.
        All prompts run in one continuous batch. Raises InvalidRequest or ContextTooLong for a prompt that cannot be served.
        """
        listed: Sequence[Any] = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else prompts
        texts = [prompt for prompt in listed if isinstance(prompt, str)]
        encoded = iter(self.tokenizer.encode_batch(texts)) if texts else iter(())
        ids = [next(encoded) if isinstance(prompt, str) else list(prompt) for prompt in listed]
        return self._runner.run(self._run(ids, self._samplings(sampling, len(ids))))

    def chat(
        self, conversations: Sequence[Any], sampling: SamplingParams | Sequence[SamplingParams] | None = None, **template_options: Any
    ) -> list[Completion]:
        """Like `generate` for one conversation or several; a conversation is a list of {"role", "content"} messages."""
        one = bool(conversations) and isinstance(conversations[0], Mapping)
        listed = [conversations] if one else conversations
        ids = [self._template.encode(messages, **template_options) for messages in listed]
        return self._runner.run(self._run(ids, self._samplings(sampling, len(ids))))

    def close(self) -> None:
        """Frees the device memory and the engine's thread. Idempotent."""
        self._runner.run(self._engine.close())
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _samplings(self, sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if sampling is None:
            return [msgspec.convert(self.card.default_sampling, SamplingParams)] * count
        if isinstance(sampling, SamplingParams):
            return [sampling] * count
        if len(sampling) != count:
            raise InvalidRequest(f"{len(sampling)} sampling parameters were given for {count} prompts", param="sampling")
        return list(sampling)

    async def _run(self, ids: list[list[int]], samplings: list[SamplingParams]) -> list[Completion]:
        """Keeps the engine full without overrunning its queue."""
        room = asyncio.Semaphore(self._at_once)

        async def one(prompt: list[int], sampling: SamplingParams) -> list[Completion]:
            async with room:
                return await gather(generate(self._engine, self.tokenizer, f"llm-{next(self._numbers)}", prompt, sampling))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt, sampling)) for prompt, sampling in zip(ids, samplings, strict=True)]
        except* NovaError as errors:
            raise _first(errors) from None
        return [completion for task in tasks for completion in task.result()]


def _first(error: BaseException) -> BaseException:
    """The plain error inside nested groups: callers catch NovaError, not groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
