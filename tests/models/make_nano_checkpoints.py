"""Writes the nano checkpoints of tests/data/nano with Hugging Face transformers: random weights, every family and RoPE variant.

Each folder holds what transformers saves (config.json, model.safetensors) and expected.npz: a prompt, the logits at each of its
positions from one dense pass, and the greedy continuation by transformers' own cached decode. Every value is exact in bfloat16, so the
same files serve any precision; transformers computes in float32. Run in an environment with torch and transformers:

    python tests/models/make_nano_checkpoints.py [FOLDER]
"""

# pyright: reportMissingImports=false

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20260
PROMPT_TOKENS = 32
GREEDY_TOKENS = 24
MIN_GAP = 5e-3
"""A continuation whose best two logits come nearer than this is drawn again: a near tie would test rounding."""

COMMON = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", dict(num_key_value_heads=4)),
    "llama3": ("LlamaConfig", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, head_dim=16)),
    "llama_linear_bias": (
        "LlamaConfig",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0), attention_bias=True, mlp_bias=True),
    ),
    "qwen2": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "qwen2_yarn": ("Qwen2Config", dict(rope_parameters=YARN, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "qwen3_yarn": ("Qwen3Config", dict(head_dim=12, rope_parameters=YARN | dict(truncate=False, beta_fast=8.0, attention_factor=1.25))),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(num_hidden_layers=3, head_dim=8, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=True)
        | dict(mlp_only_layers=[1]),
    ),
    "mistral": ("MistralConfig", dict(head_dim=16, sliding_window=7)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "gemma2": (
        "Gemma2Config",
        dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=24, attn_logit_softcapping=4.0, final_logit_softcapping=2.0)
        | dict(tie_word_embeddings=True),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            num_hidden_layers=4,
            head_dim=16,
            sliding_window=6,
            query_pre_attn_scalar=24,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            tie_word_embeddings=True,
            rope_parameters={
                "full_attention": dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
                "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
            },
        ),
    ),
}


def build(name: str, seed: int) -> Any:
    """The transformers model of a case in float32, every parameter random (norms and biases too) and exact in bfloat16."""
    import torch
    import transformers

    kind, changes = CASES[name]
    config = getattr(transformers, kind)(**(COMMON | changes))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            scaled = 0.12 if "Gemma" in kind else 1.0  # Gemma multiplies its embeddings by sqrt(hidden_size)
            values = noise * (scaled if "embed_tokens" in path else 1.3 / parameter.shape[-1] ** 0.5)
        elif path.endswith("bias"):
            values = noise * 0.3
        else:
            values = noise * 0.2 + (0.0 if "Gemma" in kind else 1.0)
        parameter.data = values.bfloat16().float()
    return model


def expect(model: Any, prompt: np.ndarray, greedy_tokens: int) -> dict[str, Any]:
    """prompt [S], logits [S, V] of one dense pass, greedy [N] by cached decode one token at a time, gap: the least top-1/top-2 distance."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor(prompt[None]), use_cache=False).logits[0]
        out = model(torch.tensor(prompt[None]), use_cache=True)
        greedy, gaps = [], []
        for _ in range(greedy_tokens):
            best = torch.topk(out.logits[0, -1], 2)
            greedy.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            out = model(torch.tensor([[greedy[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return dict(
        prompt=prompt.astype(np.int32),
        logits=logits.numpy().astype(np.float32),
        greedy=np.array(greedy, np.int32),
        gap=np.float32(min(gaps)),
    )


def draw(name: str) -> tuple[Any, dict[str, Any], int]:
    """(model, expected values, seed) of the first seed whose continuation has no near tie and is not one repeated token."""
    for seed in range(SEED, SEED + 200):
        model = build(name, seed)
        prompt = np.random.default_rng(seed).integers(3, COMMON["vocab_size"], PROMPT_TOKENS)
        expected = expect(model, prompt, GREEDY_TOKENS)
        if expected["gap"] > MIN_GAP and len(set(expected["greedy"].tolist())) >= GREEDY_TOKENS // 3:
            return model, expected, seed
    raise RuntimeError(f"no seed gave {name} a clear continuation")


def main(folder: Path) -> None:
    import torch
    import transformers

    versions = dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__, numpy=np.__version__)
    for name, (kind, changes) in CASES.items():
        model, expected, seed = draw(name)
        target = folder / name
        shutil.rmtree(target, ignore_errors=True)
        model.bfloat16().save_pretrained(target)
        (target / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(target / "expected.npz", **expected)
        made = dict(script="tests/models/make_nano_checkpoints.py", seed=seed, config_class=kind, changes=changes, versions=versions)
        (target / "provenance.json").write_text(json.dumps(made, indent=1) + "\n")
        size = sum(file.stat().st_size for file in target.iterdir())
        print(f"{name}: seed {seed}, least gap {expected['gap']:.4f}, {len(set(expected['greedy'].tolist()))} kinds of token, {size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "data" / "nano")
