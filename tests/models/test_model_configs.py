"""Config readers: published models are read whole, as their exact parameter counts prove; what is not understood is refused by name."""

from typing import Any

import pytest

from novajax.core.errors import ConfigError, WeightsError
from novajax.models.config import Dense, Experts, Llama3Scaling, ModelConfig, Rope, YarnScaling
from novajax.models.decoder import parameter_count
from novajax.models.families import keys
from novajax.models.families.registry import key_map, read_config, stated_dtype

LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3")
LLAMA2_7B = dict(
    architectures=["LlamaForCausalLM"],
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    hidden_size=4096,
    initializer_range=0.02,
    intermediate_size=11008,
    max_position_embeddings=4096,
    model_type="llama",
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=32,
    pretraining_tp=1,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    tie_word_embeddings=False,
    torch_dtype="float16",
    transformers_version="4.31.0.dev0",
    use_cache=True,
    vocab_size=32000,
)
LLAMA31_8B = LLAMA2_7B | dict(
    attention_bias=False,
    attention_dropout=0.0,
    eos_token_id=[128001, 128008, 128009],
    intermediate_size=14336,
    max_position_embeddings=131072,
    mlp_bias=False,
    num_key_value_heads=8,
    rope_scaling=LLAMA3_ROPE,
    rope_theta=500000.0,
    torch_dtype="bfloat16",
    vocab_size=128256,
)
LLAMA32_1B = LLAMA31_8B | dict(
    head_dim=64,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    rope_scaling=LLAMA3_ROPE | dict(factor=32.0),
    tie_word_embeddings=True,
)
QWEN25_7B = LLAMA2_7B | dict(
    architectures=["Qwen2ForCausalLM"],
    hidden_size=3584,
    intermediate_size=18944,
    max_position_embeddings=32768,
    max_window_layers=28,
    model_type="qwen2",
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=131072,
    use_sliding_window=False,
    vocab_size=152064,
)
QWEN3_8B = QWEN25_7B | dict(
    architectures=["Qwen3ForCausalLM"],
    attention_bias=False,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=12288,
    max_position_embeddings=40960,
    max_window_layers=36,
    model_type="qwen3",
    num_attention_heads=32,
    num_hidden_layers=36,
    num_key_value_heads=8,
    sliding_window=None,
    vocab_size=151936,
)
QWEN3_30B_A3B = QWEN3_8B | dict(
    architectures=["Qwen3MoeForCausalLM"],
    decoder_sparse_step=1,
    hidden_size=2048,
    intermediate_size=6144,
    max_window_layers=48,
    mlp_only_layers=[],
    model_type="qwen3_moe",
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_experts=128,
    num_experts_per_tok=8,
    num_hidden_layers=48,
    num_key_value_heads=4,
    output_router_logits=False,
    router_aux_loss_coef=0.001,
)
MISTRAL_7B = LLAMA2_7B | dict(
    architectures=["MistralForCausalLM"],
    intermediate_size=14336,
    max_position_embeddings=32768,
    model_type="mistral",
    num_key_value_heads=8,
    rope_theta=10000.0,
    sliding_window=4096,
)
MIXTRAL_8X7B = MISTRAL_7B | dict(
    architectures=["MixtralForCausalLM"],
    model_type="mixtral",
    num_experts_per_tok=2,
    num_local_experts=8,
    output_router_logits=False,
    rope_theta=1000000.0,
    router_aux_loss_coef=0.02,
    sliding_window=None,
)
GEMMA2_9B = dict(
    architectures=["Gemma2ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    attn_logit_softcapping=50.0,
    bos_token_id=2,
    cache_implementation="hybrid",
    eos_token_id=1,
    final_logit_softcapping=30.0,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=3584,
    initializer_range=0.02,
    intermediate_size=14336,
    max_position_embeddings=8192,
    model_type="gemma2",
    num_attention_heads=16,
    num_hidden_layers=42,
    num_key_value_heads=8,
    pad_token_id=0,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    sliding_window=4096,
    sliding_window_size=4096,
    torch_dtype="float32",
    use_cache=True,
    vocab_size=256000,
)
GEMMA3_1B = {key: value for key, value in GEMMA2_9B.items() if key not in ("hidden_act", "sliding_window_size")} | dict(
    architectures=["Gemma3ForCausalLM"],
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    hidden_size=1152,
    intermediate_size=6912,
    max_position_embeddings=32768,
    model_type="gemma3_text",
    num_attention_heads=4,
    num_hidden_layers=26,
    num_key_value_heads=1,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    vocab_size=262144,
)
PUBLISHED = {
    "llama2_7b": (LLAMA2_7B, 6_738_415_616),
    "llama31_8b": (LLAMA31_8B, 8_030_261_248),
    "llama32_1b": (LLAMA32_1B, 1_235_814_400),
    "qwen25_7b": (QWEN25_7B, 7_615_616_512),
    "qwen3_8b": (QWEN3_8B, 8_190_735_360),
    "qwen3_30b_a3b": (QWEN3_30B_A3B, 30_532_122_624),
    "mistral_7b": (MISTRAL_7B, 7_241_732_096),
    "mixtral_8x7b": (MIXTRAL_8X7B, 46_702_792_704),
    "gemma2_9b": (GEMMA2_9B, 9_241_705_984),
    "gemma3_1b": (GEMMA3_1B, 999_885_952),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_has_its_published_parameter_count(name: str):
    config, count = PUBLISHED[name]
    assert parameter_count(read_config(config)) == count


def test_structure_is_read():
    assert read_config(LLAMA31_8B).layers[0].rope == Rope(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert read_config(LLAMA32_1B).tied_embedding
    qwen = read_config(QWEN25_7B)
    assert (qwen.qkv_bias, qwen.o_bias, qwen.layers[0].window) == (True, False, None)
    windowed = read_config(QWEN25_7B | dict(use_sliding_window=True, max_window_layers=20))
    assert [kind.window for kind in windowed.layers] == [None] * 20 + [131072] * 8
    moe = read_config(QWEN3_30B_A3B | dict(mlp_only_layers=[0], decoder_sparse_step=2))
    assert [type(kind.mlp) for kind in moe.layers[:4]] == [Dense, Experts, Dense, Experts]
    assert {kind.window for kind in read_config(MISTRAL_7B).layers} == {4096}
    gemma2 = read_config(GEMMA2_9B)
    assert [kind.window for kind in gemma2.layers[:3]] == [4096, None, 4096]
    assert (gemma2.attention_softcap, gemma2.final_softcap, gemma2.norm_offset) == (50.0, 30.0, 1.0)
    gemma3 = read_config(GEMMA3_1B)
    assert [kind.window for kind in gemma3.layers[:7]] == [512] * 5 + [None, 512]
    assert [kind.rope.theta for kind in gemma3.layers[4:7]] == [1e4, 1e6, 1e4]
    assert (gemma3.qk_norm, gemma3.attention_softcap, gemma3.attention_scale) == (True, None, 1 / 16)


def test_both_spellings_of_rope_and_dtype_mean_the_same():
    new = {key: value for key, value in LLAMA31_8B.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    new |= dict(rope_parameters=LLAMA3_ROPE | dict(rope_theta=500000.0), dtype="bfloat16")
    assert read_config(new) == read_config(LLAMA31_8B)
    assert stated_dtype(new) == stated_dtype(LLAMA31_8B) == "bfloat16"
    old_type = dict(type="linear", factor=4.0)
    assert (
        read_config(LLAMA2_7B | dict(rope_scaling=old_type)).layers[0].rope.scaling
        == read_config(LLAMA2_7B | dict(rope_parameters=dict(rope_type="linear", factor=4.0))).layers[0].rope.scaling
    )
    by_kind = dict(full_attention=dict(rope_type="default", rope_theta=1e6), sliding_attention=dict(rope_type="default", rope_theta=1e4))
    gemma = {key: value for key, value in GEMMA3_1B.items() if key not in ("rope_theta", "rope_scaling", "rope_local_base_freq")}
    assert read_config(gemma | dict(rope_parameters=by_kind)) == read_config(GEMMA3_1B)


def test_yarn_lengthens_the_context_and_sets_the_attention_factor():
    cfg = read_config(QWEN3_8B | dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)))
    scaling = cfg.layers[0].rope.scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.attention_factor == pytest.approx(1.1386294361)
    assert cfg.max_context_tokens == 131072


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (LLAMA2_7B, dict(auto_map={"AutoModel": "evil.Model"}), "auto_map", "never"),
    (LLAMA2_7B, dict(model_type="mamba"), "model_type", "mamba"),
    (LLAMA2_7B, dict(model_type=["llama"]), "model_type", "llama"),
    (GEMMA3_1B, dict(model_type="gemma3", text_config={}), "model_type", "text_config"),
    (LLAMA2_7B, dict(architectures=["LlamaForSequenceClassification"]), "architectures", "SequenceClassification"),
    (LLAMA2_7B, dict(num_hidden_layers=10**9), "num_hidden_layers", "1000000000"),
    (LLAMA2_7B, dict(num_hidden_layers=0), "num_hidden_layers", "=0"),
    (LLAMA2_7B, dict(head_dim=0), "head_dim", "=0"),
    (LLAMA2_7B, dict(head_dim=63), "head_dim", "even"),
    (LLAMA2_7B, dict(hidden_size=-4096), "hidden_size", "-4096"),
    (LLAMA2_7B, dict(hidden_size=4096.0), "hidden_size", "4096.0"),
    (LLAMA2_7B, dict(hidden_size=True), "hidden_size", "True"),
    (LLAMA2_7B, dict(hidden_size=None), "hidden_size", "missing"),
    (LLAMA2_7B, dict(vocab_size=2**40), "vocab_size", "1099511627776"),
    (LLAMA2_7B, dict(num_key_value_heads=5), "num_key_value_heads", "divide"),
    (LLAMA2_7B, dict(rope_theta=float("inf")), "rope_theta", "inf"),
    (LLAMA2_7B, dict(rope_theta=float("nan")), "rope_theta", "nan"),
    (LLAMA2_7B, dict(rope_theta="10000"), "rope_theta", "'10000'"),
    (LLAMA2_7B, dict(rms_norm_eps=-1e-5), "rms_norm_eps", "-1e-05"),
    (LLAMA2_7B, dict(hidden_act="relu"), "hidden_act", "relu"),
    (LLAMA2_7B, dict(partial_rotary_factor=0.5), "partial_rotary_factor", "0.5"),
    (LLAMA2_7B, dict(quantization_config={"quant_method": "gptq"}), "quantization_config", "gptq"),
    (LLAMA2_7B, dict(attention_bias="yes"), "attention_bias", "yes"),
    (LLAMA2_7B, dict(some_new_trick=1), "some_new_trick", "1"),
    (LLAMA2_7B, dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_scaling", "dynamic"),
    (LLAMA2_7B, dict(rope_scaling=[1]), "rope_scaling", "object"),
    (LLAMA2_7B, dict(rope_scaling=LLAMA3_ROPE | dict(twist=3)), "twist", "3"),
    (LLAMA2_7B, dict(rope_scaling=LLAMA3_ROPE | dict(high_freq_factor=1.0)), "high_freq_factor", "low_freq_factor"),
    (LLAMA2_7B, dict(rope_scaling=dict(rope_type="linear", factor=0)), "factor", "0"),
    (QWEN25_7B, dict(use_mrope=True), "use_mrope", "True"),
    (QWEN25_7B, dict(dual_chunk_attention_config={}), "dual_chunk_attention_config", ""),
    (QWEN25_7B, dict(layer_types=["linear_attention"] * 28), "layer_types", "28"),
    (QWEN25_7B, dict(layer_types=["sliding_attention"] * 28), "sliding_window", "layer_types"),
    (QWEN3_30B_A3B, dict(num_experts_per_tok=129), "num_experts_per_tok", "128"),
    (QWEN3_30B_A3B, dict(mlp_only_layers="0"), "mlp_only_layers", "list"),
    (GEMMA2_9B, dict(sliding_window_size=1024), "sliding_window_size", "1024"),
    (GEMMA2_9B, dict(hidden_act="gelu"), "hidden_act", "gelu"),
    (GEMMA3_1B, dict(attn_logit_softcapping=50.0), "attn_logit_softcapping", "50.0"),
    (GEMMA3_1B, dict(use_bidirectional_attention=True), "use_bidirectional_attention", "True"),
    (GEMMA3_1B, dict(rope_parameters=dict(elsewhere={})), "rope_parameters", "elsewhere"),
]


@pytest.mark.parametrize(("base", "change", "param", "words"), REFUSED, ids=[f"{param}-{n}" for n, (_, _, param, _) in enumerate(REFUSED)])
def test_refused_by_name(base: dict[str, Any], change: dict[str, Any], param: str, words: str):
    with pytest.raises(ConfigError) as refusal:
        read_config(base | change)
    assert refusal.value.param == param
    assert param in refusal.value.message
    assert words in refusal.value.message


def test_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="torch_dtype='int4'"):
        stated_dtype(LLAMA2_7B | dict(torch_dtype="int4"))


def rules(config: dict[str, Any]) -> tuple[tuple[keys.Mapping, ...], ModelConfig]:
    cfg = read_config(config)
    return key_map(config, cfg), cfg


def test_key_map_knows_spares_and_refuses_strangers():
    untied, _ = rules(LLAMA31_8B)
    assert keys.match(untied, "lm_head.weight") == keys.Match(("head",), "v d -> d v", {})
    tied, _ = rules(LLAMA32_1B)
    assert keys.match(tied, "lm_head.weight") is None
    assert keys.match(tied, "model.layers.7.self_attn.rotary_emb.inv_freq") is None
    moe, _ = rules(QWEN3_30B_A3B)
    found = keys.match(moe, "model.layers.3.mlp.experts.17.down_proj.weight")
    assert found == keys.Match(("layers", 3, "mlp", "down"), "d f -> e f d", {"e": 17})
    for name in ("model.layers.0.self_attn.q_proj.weight_scale", "model.layers.x.self_attn.q_proj.weight", "vision.model.norm.weight"):
        with pytest.raises(WeightsError, match="belongs to no parameter"):
            keys.match(untied, name)
