"""Chat messages to prompt ids, with the model's (or the operator's) jinja template.

Templates run in the sandbox that Hugging Face uses, with the same extras, and come only from the model's directory or the
operator: the sandbox bounds no time and no memory, so a request's own template is never run. Control tokens that the template
writes become control tokens; their text in messages, tools, documents and variables stays text (`novajax.text.guard`).
The template alone decides about a begin token. Roles reach templates unguarded, so they must be known names.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import anyio.to_thread
import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from novajax.core.errors import ConfigError, InvalidRequest, Unsupported
from novajax.text.guard import Guard, unused_character
from novajax.text.tokenizer import Tokenizer

ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
"""Roles every template may be given; others only if the template names them."""

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"))
_SHOWN_CHARACTERS = 300
_MAX_VARIABLES_BYTES = 16 * 1024

Message = Mapping[str, Any]


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: marks assistant text for training; serving just renders its inside."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Raised(jinja2.TemplateError):
    """The template called raise_exception."""


def _raise_exception(message: str) -> NoReturn:
    raise _Raised(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(now: Callable[[], datetime]) -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _sources(directory: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """name -> (source, where it stands), of all templates of a model directory. Later lines win."""
    found: dict[str, tuple[str, str]] = {}
    in_config, where = config.get("chat_template"), f"{directory / 'tokenizer_config.json'}: chat_template"
    if isinstance(in_config, str):
        found["default"] = in_config, where
    elif isinstance(in_config, list):
        try:
            found |= {entry["name"]: (entry["template"], f"{where} {entry['name']}") for entry in in_config}
        except (KeyError, TypeError):
            raise ConfigError(f"{where} is neither a text nor a list of names and templates") from None
    elif in_config is not None:
        raise ConfigError(f"{where} is neither a text nor a list of names and templates")
    files = {"default": directory / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    legacy = directory / "chat_template.json"
    if legacy.exists():
        try:
            found["default"] = msgspec.json.decode(_read(legacy), type=dict[str, str])["chat_template"], str(legacy)
        except (msgspec.DecodeError, KeyError) as error:
            raise ConfigError(f"{legacy}: {error}") from None
    return found | {name: (_read(path), str(path)) for name, path in files.items() if path.exists()}


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template {path} cannot be read: {error}") from None


class ChatTemplate:
    """See the module docstring. Thread-safe after construction."""

    def __init__(self, tokenizer: Tokenizer, path: str | Path | None = None, *, now: Callable[[], datetime] = datetime.now):
        """path: the operator's template, in place of the model's. now: the wall clock that templates may print.
        Raises ConfigError, naming the file and line, for a template that does not compile."""
        self._tokenizer = tokenizer
        self._guard = Guard(tokenizer.control_tokens)
        environment = _environment(now)
        if path is None:
            self._sources = _sources(tokenizer.directory, tokenizer.config)
        else:
            self._sources = {"default": (_read(Path(path)), str(path))}
        self._constants = {"bos_token": "", "eos_token": ""} | tokenizer.special_map
        self._templates: dict[str, jinja2.Template] = {}
        variables: set[str] = set()
        for name, (source, where) in self._sources.items():
            try:
                self._templates[name] = environment.from_string(source)
                variables |= jinja2.meta.find_undeclared_variables(environment.parse(source))
            except jinja2.TemplateSyntaxError as error:
                raise ConfigError(f"{where}, line {error.lineno}: {error.message}") from None
        self._all_sources = "\n".join(source for source, _ in self._sources.values())
        taken = _RESERVED | set(environment.globals) | set(self._constants)
        self.variables = frozenset(name for name in variables - taken if not name.startswith("_"))
        """What chat_template_kwargs may set: the free variables of the template."""

    @property
    def available(self) -> bool:
        """Whether there is a template at all; without one every rendering is an InvalidRequest."""
        return bool(self._templates)

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The prompt as text; options as in `encode`, without add_special."""
        text, guard = self._render(messages, **options)
        return text.replace(guard, "") if guard else text

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_special: bool = False,
    ) -> list[int]:
        """The prompt ids. Messages are JSON values in OpenAI's shape, their content a text or a list of text parts.

        continue_final: the prompt ends inside the last message, which the model continues (excludes add_generation_prompt).
        variables: a request's chat_template_kwargs. add_special: also the tokenizer's begin token, unless the template wrote it.
        Raises InvalidRequest with the template's own message for what it refuses, Unsupported for parts that are no text.
        """
        text, guard = self._render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final=continue_final,
            tools=tools,
            documents=documents,
            variables=variables,
        )
        return self._tokenizer.encode(text, add_special=add_special, parse_special=True, guard=guard)

    async def encode_async(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """`encode` in a worker thread."""
        return await anyio.to_thread.run_sync(lambda: self.encode(messages, **options))

    def _render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, str]:
        """(prompt, the guard character in it or "")."""
        template = self._choose(bool(tools))
        if continue_final and add_generation_prompt:
            raise InvalidRequest("continue_final_message and add_generation_prompt exclude each other", param="continue_final_message")
        try:
            self._check_variables(variables or {})
            given = [self._message(message) for message in messages]
            end = self._mark_end(given) if continue_final else ""
            values = {"messages": given, "tools": tools or None, "documents": documents or None, "more": dict(variables or {})}
            values, guard = self._guard.protect(values, skip=("role",), avoid=self._all_sources + end)
            more = values.pop("more")
            text = template.render(**more, **values, **self._constants, add_generation_prompt=add_generation_prompt)
        except (InvalidRequest, ConfigError):
            raise
        except jinja2.TemplateError as error:
            shown = str(error.message)[:_SHOWN_CHARACTERS]
            raise InvalidRequest(f"the chat template refused the messages: {shown}", param="messages") from None
        except Exception as error:
            # A fault in an expression of the template, such as None + text: these messages do not fit it.
            shown = f"{type(error).__name__}: {error}"[:_SHOWN_CHARACTERS]
            raise InvalidRequest(f"the chat template cannot render the messages: {shown}", param="messages") from None
        if guard:
            text = text.replace(json.dumps(guard)[1:-1], guard)  # tojson may have escaped it
        return _cut_at(text, end), guard

    def _choose(self, tools: bool) -> jinja2.Template:
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise InvalidRequest("this model has no chat template: use completions, or start the server with one", param="messages")
        return template

    def _message(self, message: Message) -> dict[str, Any]:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not _ROLE.fullmatch(role) or not (role in ROLES or self._names(role)):
            raise InvalidRequest(f"the role must be one of {', '.join(sorted(ROLES))}", param="messages")
        if isinstance(content, (list, tuple)):
            content = "\n".join(map(_part_text, content))
        elif content is None and not message.get("tool_calls"):
            content = ""
        elif content is not None and not isinstance(content, str):
            raise InvalidRequest("the content of a message must be a text or a list of parts", param="messages")
        return {**message, "content": content}

    def _names(self, role: str) -> bool:
        return f"'{role}'" in self._all_sources or f'"{role}"' in self._all_sources

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if name not in self.variables:
                known = ", ".join(sorted(self.variables)) or "none"
                raise InvalidRequest(f"the chat template has no such variable; it has: {known}", param="chat_template_kwargs")
        if len(json.dumps(variables)) > _MAX_VARIABLES_BYTES:
            raise InvalidRequest(f"chat_template_kwargs has more than {_MAX_VARIABLES_BYTES} bytes", param="chat_template_kwargs")

    def _mark_end(self, messages: list[dict[str, Any]]) -> str:
        """Puts a private-use character behind the last message's content and returns it."""
        content = messages[-1]["content"] if messages else None
        if not content:
            raise InvalidRequest("continue_final_message needs a last message with content", param="continue_final_message")
        end = unused_character(set(json.dumps(messages, ensure_ascii=False)) | set(self._all_sources))
        messages[-1]["content"] = content + end
        return end


def _part_text(part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") not in ("text", "input_text", "output_text"):
        raise Unsupported("content parts other than text are not served by this model", param="messages")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest("a text part needs a text", param="messages")
    return text


def _cut_at(text: str, end: str) -> str:
    if not end:
        return text
    at = text.rfind(end)
    if at < 0:
        raise InvalidRequest("the chat template left the last message out", param="continue_final_message")
    return text[:at].replace(end, "")
