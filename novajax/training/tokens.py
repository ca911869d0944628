"""The tokenizer of a trained model: byte-level BPE, every digit a token of its own, and the files Hugging Face readers expect beside it."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from novajax.core.errors import ConfigError
from novajax.training.data import BOS, END, PAD, ROLES

SPECIALS = (PAD, BOS, END, *(f"<|{role}|>" for role in ROLES))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Exactly `vocab` entries: the special tokens, the 256 bytes, and merges. Raises ConfigError when the texts have too few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ConfigError(f"the texts gave {tokenizer.get_vocab_size()} tokens, the recipe asks for {vocab}", param="vocab")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, context_tokens: int) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": context_tokens,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [token for token in SPECIALS if token not in (BOS, END, PAD)],
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def first_texts(make: Any, count: int) -> Iterable[str]:
    """Texts of the first `count` documents."""
    return itertools.chain.from_iterable((segment.text for segment in make(index)) for index in range(count))
