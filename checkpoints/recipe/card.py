"""python checkpoints/recipe/card.py DIR: README.md (the model card) and loss.png, from what training and evaluation left."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

CARD = """---
license: apache-2.0
language: en
---
# {name}

{what} Trained from random weights by this project, on text that the project's own generator writes
(`checkpoints/recipe/nova_corpus`): short stories, questions and answers about a small world, small arithmetic, JSON on request,
and small jobs on given text. No text from elsewhere was used. Weights, tokenizer and data are under the Apache License 2.0.

It is made to show and test an engine, not to be relied on: it knows about as much as its generator, and it makes mistakes.

| | |
|---|---|
| parameters | {parameters:,} ({tied}), stored in bfloat16 |
| layers, embed, mlp | {layers}, {embed}, {mlp} |
| heads | {heads} query, {kv_heads} KV, head size {head_dim} |
| vocabulary | {vocab} byte-level BPE, each digit a token |
| context | {context} tokens |
| trained on | {tokens:,} tokens of fresh documents, {steps} steps, {minutes:.0f} minutes on a shared 2-core CPU |
| optimizer | Muon (matrices) and Adam (embedding, norms) from optax; data fed by grain |

Make it again, from corpus to evaluation: `python -m novajax.train --recipe=checkpoints/recipe/{name}.yaml`. `training.json` holds the
recipe and every point of the loss curve.

![loss](loss.png)

## Chat format
`<|bos|><|system|>...<|end|><|user|>...<|end|><|assistant|>...<|end|>`; the system turn may be left out. A reply ends with `<|end|>`.

## Evaluation
200 prompts made with the keys that training never saw (`evaluation.json` has every wrong reply): sums and differences with held-out
operand pairs, entries of the times table and known facts in held-out wordings, JSON with held-out values, new text to work on. The
five open requests for JSON, which leave the values to the model, have wordings that training saw.

| | greedy | temperature {temperature}, top-p {top_p} |
|---|---|---|
{rows}
{extra}
Sums and JSON asked at the end of a longer chat, greedy, right by tokens of talk before them: {context_rates}. Nearly all training
was on conversations of at most 256 tokens.

## Answers, greedy
{examples}
"""


def write_card(directory: Path) -> None:
    """README.md and, where matplotlib is installed, loss.png."""
    training, config = (json.loads((directory / name).read_text()) for name in ("training.json", "config.json"))
    evaluation = json.loads((directory / "evaluation.json").read_text())
    greedy, sampled = evaluation["greedy"], evaluation["sampled"]
    heads = [("arithmetic right", "arithmetic_right"), ("JSON valid", "json_valid"), ("all right", "all_right")]
    rows = [f"| {label} | {greedy[key]:.1%} | {sampled[key]:.1%} |" for label, key in heads]
    rows += [f"| {kind.replace('_', ' ')} | {count} | {sampled['by_kind'][kind]} |" for kind, count in greedy["by_kind"].items()]
    examples = [
        "\n".join(f"> **{m['role']}:** {m['content']}  " for m in row["messages"]) + f"\n> **assistant:** {row['reply']}"
        for row in greedy["examples"]
    ]
    agreement = evaluation.get("agreement")
    text = CARD.format(
        name=training["recipe"]["name"],
        what=_what(agreement),
        parameters=training["parameters"],
        tied="tied embedding" if config["tie_word_embeddings"] else "the head is its own matrix",
        layers=config["num_hidden_layers"],
        embed=config["hidden_size"],
        mlp=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        tokens=training["tokens"],
        steps=training["curve"][-1]["step"],
        minutes=training["elapsed_s"] / 60,
        temperature=sampled["temperature"],
        top_p=sampled["top_p"],
        rows="\n".join(rows),
        context_rates=", ".join(f"{tokens}: {rate}" for tokens, rate in evaluation["right_after_tokens"].items()),
        extra=f"\nGreedy agreement with {agreement['model']}: {agreement['same']:.1%} of {agreement['tokens']:,} reply tokens.\n"
        if agreement
        else "",
        examples="\n\n".join(examples),
    )
    (directory / "README.md").write_text(text)
    if importlib.util.find_spec("matplotlib"):
        _plot(training["curve"], directory / "loss.png", training["recipe"]["name"])


def _what(agreement: dict[str, Any] | None) -> str:
    return (
        f"A draft of {agreement['model']} for speculative decoding: same tokenizer, same corpus."
        if agreement
        else "A very small English chat model."
    )


def _plot(curve: list[dict[str, Any]], path: Path, name: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), dpi=100)
    axes.plot([point["tokens"] / 1e6 for point in curve], [point["loss"] for point in curve])
    axes.set_yscale("log")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("weighted loss, nats per token")
    axes.set_title(name)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
