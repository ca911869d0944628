"""A tokenizer directory made of nothing, for tests and demonstrations: every byte is a token, plus ChatML control tokens."""

from pathlib import Path

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZE = 256 + len(CONTROL_TOKENS)
"""Ids 0-255 are the bytes (in the byte-level alphabet's order), then the control tokens."""

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_byte_tokenizer(directory: Path) -> Path:
    """Writes tokenizer.json and tokenizer_config.json (ChatML template, no begin token, <|im_end|> ends) into an existing directory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    library.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False, "chat_template": _TEMPLATE}
    (directory / "tokenizer_config.json").write_bytes(msgspec.json.encode(config))
    return directory
