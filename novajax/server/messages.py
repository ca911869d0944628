"""Chat messages of a request to prompt ids: what may stand in a message, how much text, and the template's options."""

from typing import Any

from novajax.core.errors import InvalidRequest, Unsupported
from novajax.core.types import ModelCard
from novajax.server.front import Front
from novajax.server.schemas import ChatRequest, Message, TokenizeRequest
from novajax.text.tokenizer import check_bytes


async def prompt_of(front: Front, card: ModelCard, body: ChatRequest | TokenizeRequest) -> list[int]:
    """The prompt ids of body.messages. Raises InvalidRequest or Unsupported, naming the message."""
    messages = [_plain(number, message) for number, message in enumerate(body.messages or ())]
    check_bytes([message["content"] for message in messages], front.settings.prompt_bytes(card.max_request_tokens), "messages")
    return await front.template.encode_async(
        messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final=body.continue_final_message,
        variables=body.chat_template_kwargs,
        add_special=bool(body.add_special_tokens),
    )


def _plain(number: int, message: Message) -> dict[str, Any]:
    """A message as templates read it: the content is one text."""
    where = f"messages[{number}]"
    if message.tool_calls or message.function_call or message.role in ("tool", "function"):
        raise Unsupported(f"{where}: tools are not supported by this version", param=where)
    # To templates that know no developer, it is the system that speaks.
    plain = {"role": "system" if message.role == "developer" else message.role, "content": _text(where, message)}
    return plain if message.name is None else plain | {"name": message.name}


def _text(where: str, message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        raise InvalidRequest(f"{where}: content is missing", param=f"{where}.content")
    texts: list[str] = []
    for place, part in enumerate(message.content):
        at = f"{where}.content[{place}]"
        if part.type != "text":
            raise Unsupported(f"{at}: only text parts are supported by this version", param=at)
        if part.text is None:
            raise InvalidRequest(f"{at}: a text part needs a text", param=at)
        texts.append(part.text)
    return "\n".join(texts)
