"""The four shapes in which OpenAI's and vLLM's clients read log probabilities, made from `TextLogprob`s."""

from collections.abc import Iterable, Sequence

from novajax.server.replies import ChatLogprob, ChatLogprobs, ChatTop, PromptLogprob, PromptLogprobs, TextLogprobs
from novajax.text.alternative import TextLogprob


def chat_logprobs(entries: Sequence[TextLogprob]) -> ChatLogprobs:
    """Chat: one object for each token, with its exact bytes."""
    return ChatLogprobs(
        [
            ChatLogprob(
                entry.text,
                entry.logprob,
                list(entry.data),
                [ChatTop(top.text, top.logprob, list(top.data)) for top in entry.top],
            )
            for entry in entries
        ]
    )


def text_logprobs(entries: Iterable[TextLogprob], shift: int, echoed: TextLogprobs | None = None) -> TextLogprobs:
    """Completions: parallel lists. `shift` is added to each offset: the characters of the echoed prompt, whose own lists come first."""
    lists = TextLogprobs([], [], [], []) if echoed is None else echoed
    tokens, logprobs = list(lists.tokens), list(lists.token_logprobs)
    tops, offsets = list(lists.top_logprobs or []), list(lists.text_offset)
    for entry in entries:
        tokens.append(entry.text)
        logprobs.append(entry.logprob)
        tops.append(_by_text(entry))
        offsets.append(shift + entry.offset)
    return TextLogprobs(tokens, logprobs, tops, offsets)


def echoed_logprobs(first_text: str, entries: Sequence[TextLogprob | None]) -> TextLogprobs:
    """Completions with echo: the prompt's own tokens. Nothing comes before the first one, so its logprob is null."""
    rest = text_logprobs((entry for entry in entries if entry is not None), 0)
    return TextLogprobs(
        [first_text, *rest.tokens], [None, *rest.token_logprobs], [None, *(rest.top_logprobs or [])], [0, *rest.text_offset]
    )


def prompt_logprobs(entries: Sequence[TextLogprob | None]) -> PromptLogprobs:
    """vLLM's `prompt_logprobs`: for each prompt token a map from token id, the prompt's own token and the likeliest ones."""
    maps: PromptLogprobs = []
    for entry in entries:
        if entry is None:
            maps.append(None)
            continue
        found = {top.token: PromptLogprob(top.logprob, place, top.text) for place, top in enumerate(entry.top, start=1)}
        found[entry.token] = PromptLogprob(entry.logprob, entry.rank, entry.text)
        maps.append(found)
    return maps


def _by_text(entry: TextLogprob) -> dict[str, float]:
    """Of tokens with the same text the likelier counts; the token itself is always there."""
    found: dict[str, float] = {}
    for top in entry.top:
        found.setdefault(top.text, top.logprob)
    found.setdefault(entry.text, entry.logprob)
    return found
