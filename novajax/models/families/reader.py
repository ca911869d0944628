"""A strict reader of a Hugging Face config.json: every key is either asked for, known not to matter, or refused.

Invariants: nothing from the file is executed or looked up; sizes are bounded before anything is built from them. Every
error is a ConfigError whose `param` is the key.
"""

import math
from typing import Any, NoReturn

from novajax.core.errors import ConfigError

MAX_LAYERS = 1024
MAX_SIZE = 1 << 20
"""Largest embed, mlp or head count accepted: far above any model, far below what hurts."""
MAX_VOCAB = 1 << 22
MAX_CONTEXT_TOKENS = 1 << 27

HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "embd_pdrop",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "max_sequence_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "resid_pdrop",
        "return_dict",
        "return_dict_in_generate",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)
"""Keys that do not change what a forward pass computes, whatever their value. (A router's jitter acts in training only.)"""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "cross_attention_hidden_size": (None,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0, None),
    "use_bidirectional_attention": (False, None),
    "is_llama_config": (True,),
    "rope_interleaved": (False,),
}
"""Keys that are understood only at these values."""


class Reader:
    """One pass over a config; `finish` refuses what was not read."""

    def __init__(self, config: dict[str, Any]):
        self._config = config
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._config.get(key) is not None

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it is, null counting as absent; the key is now understood."""
        self._read.add(key)
        value = self._config.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, *, most: int = MAX_SIZE, least: int = 1) -> int:
        """A whole number in [least, most]."""
        value = self._present(key, default)
        if type(value) is not int or not least <= value <= most:
            raise ConfigError(f"config.json: {key}={value!r} must be a whole number from {least} to {most}", param=key)
        return value

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = self._present(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            raise ConfigError(f"config.json: {key}={value!r} must be a finite number above {above:g}", param=key)
        return float(value)

    def optional_size(self, key: str, *, absent: int | None) -> int | None:
        """Like `size`; null means None, and no key at all means `absent`."""
        self._read.add(key)
        return absent if key not in self._config else self.size(key) if self.has(key) else None

    def optional_number(self, key: str, *, absent: float | None) -> float | None:
        """Like `number`; null means None, and no key at all means `absent`."""
        self._read.add(key)
        return absent if key not in self._config else self.number(key) if self.has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._present(key, default)
        if type(value) is not bool:
            raise ConfigError(f"config.json: {key}={value!r} must be true or false", param=key)
        return value

    def choice(self, key: str, table: dict[str, Any], default: str | None = None) -> Any:
        """table[value]."""
        value = self._present(key, default)
        if not isinstance(value, str) or value not in table:
            raise ConfigError(f"config.json: {key}={value!r} is not supported; supported: {', '.join(table)}", param=key)
        return table[value]

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuses the key at any value but these; absent or null is fine."""
        value = self.raw(key)
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise ConfigError(f"config.json: {key}={value!r} is not supported", param=key)

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raises ConfigError: `key=value why`."""
        raise ConfigError(f"config.json: {key}={self._config.get(key)!r:.200} {why}", param=key)

    def finish(self) -> None:
        """Raises ConfigError for the first key nobody understood."""
        for key, value in self._config.items():
            if key in self._read or key in HARMLESS:
                continue
            if key in NEUTRAL and any(type(value) is type(one) and value == one for one in NEUTRAL[key]):
                continue
            raise ConfigError(f"config.json: {key}={value!r:.200} is not understood, so the model is refused", param=key)

    def _present(self, key: str, default: Any) -> Any:
        value = self.raw(key, default)
        if value is None:
            raise ConfigError(f"config.json: {key} is missing", param=key)
        return value
