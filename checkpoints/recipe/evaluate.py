"""python checkpoints/recipe/evaluate.py DIR: 200 prompts that training never saw, checked by kind, greedy and sampled.

The prompts come from the corpus generators with the held-out keys: operand pairs, names with ages, facts in other
words. Writes DIR/evaluation.json.
"""

import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from card import write_card
from generate import Generator, load
from nova_corpus import arithmetic, facts, jsons, stories, talk, tasks
from nova_corpus.base import HELD_OUT, Exchange
from nova_corpus.base import Generator as Make
from nova_corpus.mixture import dialogue

ROWS = 40
CONTEXTS = (0, 128, 256, 512, 1024, 1800)
PLAN: tuple[tuple[int, Make], ...] = (
    (20, arithmetic.add),
    (20, arithmetic.subtract),
    (10, arithmetic.times),
    (5, arithmetic.divide),
    (15, arithmetic.word_problem),
    (40, jsons.request),
    (5, jsons.invented),
    (5, jsons.question),
    (30, talk.fact),
    (15, talk.remember),
    (10, tasks.extract),
    (10, tasks.sort),
    (10, tasks.repeat),
    (5, stories.story),
)
ARITHMETIC = frozenset({"add", "subtract", "times", "divide", "word_problem"})
JSON = frozenset({"json", "json_free"})
SHOWN: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Hello!"),),
    (("user", "Who are you?"),),
    (("user", "What can you do?"),),
    (("user", "What is 47 + 38?"),),
    (("user", "Ana has 23 apples and finds 19 more. How many apples does she have?"),),
    (("user", "What is the capital of France?"),),
    (("user", "What is the opposite of hot?"),),
    (("user", "Give me JSON for a person named Ana, age 30, city Rome."),),
    (("user", "Write JSON for an order by Ben: items apple and lantern, total 12."),),
    (("user", "Tell me a story about a fox."),),
    (("user", "Tell me a story about an owl and a lantern."),),
    (
        ("user", "My name is Ana."),
        ("assistant", "Hello Ana! How can I help you?"),
        ("user", "What is 12 + 30?"),
        ("assistant", "12 + 30 = 42"),
        ("user", "What is my name?"),
    ),
    (("user", "Sort 42, 7, 19 from smallest to largest."),),
    (("user", "Tom has a red ball. Ana has a blue kite. What colour is the kite?"),),
    (("user", "Repeat after me: blue lantern fox"),),
    (("user", "Explain quantum physics."),),
)

Turns = tuple[tuple[str, str], ...]


def prompts(seed: int, plan: Sequence[tuple[int, Make]] = PLAN) -> list[tuple[Turns, Exchange]]:
    """(the conversation so far, the exchange to answer) for each prompt of the plan, held-out keys only."""
    rng = random.Random(f"evaluation/{seed}")
    items = []
    for count, make in plan:
        for _ in range(count):
            made = make(rng, HELD_OUT)
            exchanges = made.exchanges[:1] if made.exchanges[0].kind == "story" else made.exchanges
            turns: list[tuple[str, str]] = [("system", made.system)] if made.system else []
            for exchange in exchanges[:-1]:
                turns += [("user", exchange.user), ("assistant", exchange.assistant)]
            items.append(((*turns, ("user", exchanges[-1].user)), exchanges[-1]))
    return items


def is_right(exchange: Exchange, reply: str) -> bool:
    """Numbers: the number after the last equals sign. JSON: parses to the same value. Stories: what was asked for is in
    them. Else the answer is in the reply."""
    if exchange.kind in ARITHMETIC:
        numbers = re.findall(r"= (-?\d+)", reply)
        return bool(numbers) and numbers[-1] == exchange.answer
    if exchange.kind == "json":
        return is_json(reply) and json.loads(reply) == json.loads(exchange.answer)
    if exchange.kind == "json_free":
        return is_json(reply)
    if exchange.kind == "story":
        asked = re.findall(r"\b(?:about|with) an? (\w+)", exchange.user)
        return len(reply.split()) > 40 and all(word in reply for word in asked)
    if exchange.kind == "name_some":
        return all(item in facts.CATEGORIES[exchange.answer] for item in re.split(r", |\n?\d+\. ", reply) if item)
    if exchange.kind in ("sort", "repeat"):
        return reply.strip() == exchange.answer
    return exchange.answer in reply


def is_json(reply: str) -> bool:
    """Whether the whole reply parses."""
    try:
        json.loads(reply)
    except ValueError:
        return False
    return True


def answer_all(generator: Generator, items: Sequence[tuple[Turns, Exchange]], temperature: float, top_p: float, seed: int) -> list[str]:
    """Replies in order; long kinds run apart, so that short ones do not wait for them."""
    replies: dict[int, str] = {}
    for limit, chosen in ((256, True), (72, False)):
        indexes = [i for i, (_, exchange) in enumerate(items) if (exchange.kind == "story") == chosen]
        for start in range(0, len(indexes), ROWS):
            part = indexes[start : start + ROWS]
            padded = part + part[:1] * (ROWS - len(part)) if len(indexes) > ROWS else part
            texts = generator.chat([items[i][0] for i in padded], limit, temperature, top_p, seed + start)
            replies.update(zip(part, texts, strict=False))
    return [replies[i] for i in range(len(items))]


def score(items: Sequence[tuple[Turns, Exchange]], replies: Sequence[str]) -> dict[str, Any]:
    """Rates by kind and the three headline rates, with every wrong reply."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    valid, wrong = [], []
    for (turns, exchange), reply in zip(items, replies, strict=True):
        right = is_right(exchange, reply)
        by_kind[exchange.kind].append(right)
        if exchange.kind in JSON:
            valid.append(is_json(reply))
        if not right:
            wrong.append({"kind": exchange.kind, "prompt": turns[-1][1], "reply": reply, "expected": exchange.answer})
    arithmetic_rights = [right for kind, rights in by_kind.items() if kind in ARITHMETIC for right in rights]
    return {
        "prompts": len(items),
        "arithmetic_right": round(sum(arithmetic_rights) / max(1, len(arithmetic_rights)), 4),
        "json_valid": round(sum(valid) / max(1, len(valid)), 4),
        "all_right": round(sum(map(sum, by_kind.values())) / len(items), 4),
        "by_kind": {kind: f"{sum(rights)}/{len(rights)}" for kind, rights in by_kind.items()},
        "wrong": wrong,
    }


def agreement(draft: Generator, generator: Generator, items: Sequence[tuple[Turns, Exchange]], name: str) -> dict[str, Any]:
    """How often the draft's greedy token is the model's, along the model's own greedy replies."""
    replies = answer_all(generator, items, 0.0, 1.0, 0)
    prompts_ids = [generator.encode(turns) for turns, _ in items]
    same = total = 0
    for prompt, reply in zip(prompts_ids, replies, strict=True):
        ids = [*prompt, *generator.tokenizer.encode(reply).ids, generator.end]
        guesses = draft.guesses(ids)
        same += sum(guess == token for guess, token in zip(guesses[len(prompt) - 1 : -1], ids[len(prompt) :], strict=True))
        total += len(ids) - len(prompt)
    return {"model": name, "tokens": total, "same": round(same / total, 4)}


def right_by_context(generator: Generator, seed: int, count: int = 16) -> dict[str, str]:
    """Sums and JSON asked after so many tokens of other talk, greedy: how far the context carries."""
    rng, rates = random.Random(f"context/{seed}"), {}
    for tokens in CONTEXTS:
        items = prompts(seed + tokens, ((count // 2, arithmetic.add), (count // 2, jsons.request)))
        before: list[tuple[str, str]] = []
        while len(generator.encode(before)) < tokens:
            for exchange in dialogue(rng, HELD_OUT, 1).exchanges:
                before += [("user", exchange.user), ("assistant", exchange.assistant)]
        replies = generator.chat([(*before, *turns) for turns, _ in items], 72)
        rates[str(tokens)] = f"{sum(is_right(exchange, reply) for (_, exchange), reply in zip(items, replies, strict=True))}/{count}"
    return rates


def write_report(directory: Path, show: Callable[[str], object] = print, seed: int = 1) -> dict[str, Any]:
    """Evaluate the checkpoint in `directory` and keep the figures beside it."""
    generator, items = load(directory), prompts(seed)
    report: dict[str, Any] = {"seed": seed}
    for name, temperature, top_p in (("greedy", 0.0, 1.0), ("sampled", 0.7, 0.95)):
        report[name] = {"temperature": temperature, "top_p": top_p, **score(items, answer_all(generator, items, temperature, top_p, seed))}
        show(f"{name}: " + ", ".join(f"{key} {report[name][key]}" for key in ("arithmetic_right", "json_valid", "all_right", "by_kind")))
        texts = generator.chat(SHOWN, 256, temperature, top_p, seed)
        report[name]["examples"] = [
            {"messages": [{"role": role, "content": text} for role, text in turns], "reply": reply}
            for turns, reply in zip(SHOWN, texts, strict=True)
        ]
    report["right_after_tokens"] = right_by_context(generator, seed)
    show(f"right after so many tokens of talk: {report['right_after_tokens']}")
    for row in report["greedy"]["examples"]:
        show(f"> {row['messages'][-1]['content']}\n{row['reply']}\n")
    larger = json.loads((directory / "training.json").read_text())["recipe"]["tokenizer"]["reuse"]
    if larger:
        report["agreement"] = agreement(generator, load(directory.parent / larger), items, larger)
        show(f"greedy agreement: {report['agreement']}")
    (directory / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    write_card(directory)
    return report


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
