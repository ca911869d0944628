"""Random-weight checkpoints of named shapes, in Hugging Face layout: speed without a download.

`python -m bench.shapes --shape=135m` prints the directory, made once under --cache_dir. The tokenizer is bytes plus
filler words, so any text encodes and any id decodes. Tensors are drawn and written one at a time from a seed of their
own name, so two machines make the same file, and a shape larger than memory can be made with --shard_mib. With
--repeating the model says its tokens over and over, in rounds of 16 (a tied one says the last token again): layers compute as much as
ever and add nothing, and the head is the embedding, shifted. For what depends on text that repeats itself.

Examples:
  python -m bench.shapes --shape=list
  python -m bench.shapes --shape=1.1b --weights_dtype=bfloat16 --shard_mib=512
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import safetensors.numpy
from absl import app, flags
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FLAGS = flags.FLAGS

_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SCALE = 0.02
_ROUND = 16


def define_flags() -> None:
    """Declares this program's flags. Not at import: two programs may be imported together."""
    flags.DEFINE_string("shape", "135m", "name of the shape; `list` shows them all")
    flags.DEFINE_string("cache_dir", ".cache/shapes", "where checkpoints are kept")
    flags.DEFINE_enum("weights_dtype", "float32", list(_DTYPES), "stored type of the weights")
    flags.DEFINE_bool("repeating", False, "weights that make the model go round in its text")
    flags.DEFINE_integer("shard_mib", 0, "split the weights into files of about this size; 0: one file", lower_bound=0)


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A Llama decoder by its sizes."""

    layers: int
    embed: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    context_tokens: int = 2048
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for _, shape in tensors(self))


SHAPES = {
    "tiny": Shape(layers=2, embed=64, heads=4, kv_heads=2, mlp=128, vocab=512, tied=True),
    "135m": Shape(layers=30, embed=576, heads=9, kv_heads=3, mlp=1536, vocab=49152, tied=True),
    "1.1b": Shape(layers=22, embed=2048, heads=32, kv_heads=4, mlp=5632, vocab=32000),
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and dimensions, in file order."""
    embed, q_dim, kv_dim = shape.embed, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, embed)
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (embed,)
        yield f"{layer}.self_attn.q_proj.weight", (q_dim, embed)
        yield f"{layer}.self_attn.k_proj.weight", (kv_dim, embed)
        yield f"{layer}.self_attn.v_proj.weight", (kv_dim, embed)
        yield f"{layer}.self_attn.o_proj.weight", (embed, q_dim)
        yield f"{layer}.post_attention_layernorm.weight", (embed,)
        yield f"{layer}.mlp.gate_proj.weight", (shape.mlp, embed)
        yield f"{layer}.mlp.up_proj.weight", (shape.mlp, embed)
        yield f"{layer}.mlp.down_proj.weight", (embed, shape.mlp)
    yield "model.norm.weight", (embed,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, embed)


def make_checkpoint(name: str, cache_dir: Path, dtype: str = "float32", shard_bytes: int = 0, *, repeating: bool = False) -> Path:
    """The directory of the checkpoint, made on the first call. `shard_bytes` 0: a single file. An unfinished one is never seen."""
    shape = SHAPES[name]
    directory = cache_dir / f"{name}-{dtype}{f'-{shard_bytes >> 20}mib' if shard_bytes else ''}{'-repeating' * repeating}"
    if directory.exists():
        return directory
    making = directory.with_name(f"{directory.name}.making.{os.getpid()}")
    making.mkdir(parents=True)
    try:
        _write_json(making / "config.json", _config(shape, dtype))
        _write_json(making / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
        _write_tokenizer(making, shape.vocab)
        _write_weights(making, shape, dtype, shard_bytes, repeating=repeating)
        making.rename(directory)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return directory


def _config(shape: Shape, dtype: str) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.embed,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": dtype,
    }


def _write_tokenizer(directory: Path, vocab: int) -> None:
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġw{i}" for i in range(len(words), vocab)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False},
    )


def _write_weights(directory: Path, shape: Shape, dtype: str, shard_bytes: int, *, repeating: bool) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled_bytes = 0
    for name, dims in tensors(shape):
        tensor_bytes = int(np.prod(dims)) * _DTYPES[dtype].itemsize
        if shard_bytes and shards[-1] and filled_bytes + tensor_bytes > shard_bytes:
            shards.append({})
            filled_bytes = 0
        shards[-1][name] = dims
        filled_bytes += tensor_bytes
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    total_bytes = 0
    for file, shard in zip(files, shards, strict=True):
        draw = _draw_repeating if repeating else _draw
        drawn = {name: draw(name, dims).astype(_DTYPES[dtype]) for name, dims in shard.items()}
        total_bytes += sum(array.nbytes for array in drawn.values())
        safetensors.numpy.save_file(drawn, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _draw(name: str, dims: tuple[int, ...]) -> np.ndarray:
    if len(dims) == 1:
        return np.ones(dims, np.float32)  # norms
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    values = np.random.default_rng(seed).standard_normal(dims, np.float32)
    values *= _SCALE
    return values


def _draw_repeating(name: str, dims: tuple[int, ...]) -> np.ndarray:
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return np.zeros(dims, np.float32)
    if name != "lm_head.weight":
        return _draw(name, dims)
    return np.roll(_draw("model.embed_tokens.weight", dims).reshape(-1, _ROUND, dims[1]), 1, axis=1).reshape(dims)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def checkpoint_from_flags() -> Path:
    """Raises UsageError for an unknown shape."""
    if FLAGS.shape not in SHAPES:
        raise app.UsageError(f"--shape must be one of {', '.join(SHAPES)}", exitcode=2)
    return make_checkpoint(FLAGS.shape, Path(FLAGS.cache_dir), FLAGS.weights_dtype, FLAGS.shard_mib << 20, repeating=FLAGS.repeating)


def main(_: list[str]) -> int:
    if FLAGS.shape == "list":
        for name, shape in SHAPES.items():
            print(f"{name:6} {shape.parameters:>13,} parameters  {shape}")
        return 0
    print(checkpoint_from_flags())
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
