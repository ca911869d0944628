"""llama.cpp on this CPU through llama-cpp-python's C interface, in its own environment; prints one JSON object as its last line.

Stands alone (standard library, numpy, gguf, llama_cpp). Writes a GGUF file of the Hugging Face Llama checkpoint first, once,
without a tokenizer: prompts are random ids. All sequences are decoded in one batch a step, greedily (argmax by numpy of the
logits of each), so neither a server nor a sampler is timed. The decode rate leaves out the prefill.

Example: PEER_PYTHON bench/peers/llama_cpp_cpu.py --model=DIR --weights=q8_0 --batch_size=16
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
_UBATCH_TOKENS = 512


def tensors(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a safetensors checkpoint as float32 under its own name."""
    for path in sorted(model.glob("*.safetensors")):
        raw = np.memmap(path, np.uint8, "r")
        length = int(raw[:8].view(np.uint64)[0])
        header = json.loads(raw[8 : 8 + length].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            data = raw[begin:end].tobytes()
            if entry["dtype"] == "BF16":
                array = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                array = np.frombuffer(data, {"F32": np.float32, "F16": np.float16}[entry["dtype"]]).astype(np.float32)
            yield name, array.reshape(entry["shape"])


def gguf_name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def write_gguf(model: Path, path: Path, weights: str) -> None:
    """Matrices in `weights`, norms in float32. An unfinished file is never seen."""
    import gguf  # pyright: ignore[reportMissingImports] - lives in the peer's environment

    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    making = path.with_name(f"{path.name}.making.{os.getpid()}")
    writer = gguf.GGUFWriter(making, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[weights.upper()]
    for name, array in tensors(model):
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), array)
            continue
        if "q_proj" in name or "k_proj" in name:  # GGUF's Llama turns neighbouring pairs, the checkpoint turns halves
            count = heads if "q_proj" in name else kv_heads
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    making.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="a local Hugging Face directory of a Llama")
    parser.add_argument("--weights", default="bf16", choices=["f32", "f16", "bf16", "q8_0", "q4_0"])
    parser.add_argument("--gguf_dir", type=Path, default=Path(".cache/gguf"), help="where GGUF files are kept")
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--output_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=1)
    args = parser.parse_args()

    import llama_cpp as llama  # pyright: ignore[reportMissingImports] - lives in the peer's environment

    args.gguf_dir.mkdir(parents=True, exist_ok=True)
    path = args.gguf_dir / f"{args.model.resolve().name}-{args.weights}.gguf"
    if not path.exists():
        write_gguf(args.model, path, args.weights)
    threads, rows = len(os.sched_getaffinity(0)), args.batch_size
    begun_s = time.perf_counter()
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp does not load {path}")
    settings = llama.llama_context_default_params()
    row_tokens = -(-(args.prompt_tokens + args.output_tokens) // 256) * 256  # a sequence's share is a multiple of 256
    settings.n_ctx, settings.n_seq_max = rows * row_tokens, rows
    settings.n_batch, settings.n_ubatch = rows * args.prompt_tokens, _UBATCH_TOKENS
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(model, settings)
    if not context:
        sys.exit("llama.cpp makes no context")
    load_s = time.perf_counter() - begun_s
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(rows * args.prompt_tokens, 0, 1)

    def step(ids: np.ndarray, position: int) -> np.ndarray:
        """ids [S, T] at `position` of each sequence: the next id of each [S, 1]."""
        batch.n_tokens = ids.size
        for index, (row, offset) in enumerate(np.ndindex(*ids.shape)):
            batch.token[index] = int(ids[row, offset])
            batch.pos[index] = position + offset
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
            batch.logits[index] = offset == ids.shape[1] - 1
        code = llama.llama_decode(context, batch)
        if code:
            sys.exit(f"llama_decode gave {code}")
        last = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, (row + 1) * ids.shape[1] - 1), (vocab,)) for row in range(rows)]
        return np.array([logits.argmax() for logits in last])[:, None]

    draw = np.random.default_rng(0)
    step(draw.integers(256, vocab, (rows, 8)), 0)
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    prompt = draw.integers(min(256, vocab // 2), vocab, (rows, args.prompt_tokens))
    begun_s = time.perf_counter()
    ids = step(prompt, 0)
    prefill_s = time.perf_counter() - begun_s
    for number in range(args.output_tokens - 1):
        ids = step(ids, args.prompt_tokens + number)
    total_s = time.perf_counter() - begun_s
    result = {
        "batch": rows,
        "load_s": load_s,
        "prefill_s": prefill_s,
        "output_tokens_per_s": rows * args.output_tokens / total_s,
        "decode_tokens_per_s": rows * (args.output_tokens - 1) / (total_s - prefill_s),
        "prefill_tokens_per_s": rows * args.prompt_tokens / prefill_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps({"peer": "llama.cpp", "versions": {"llama-cpp-python": llama.__version__}, "threads": threads, "results": [result]}))


if __name__ == "__main__":
    main()
