"""Models for planner tests: the published ones from configs/, and one small enough to count by hand."""

from pathlib import Path

import yaml

from novajax.models.config import Dense, LayerKind, ModelConfig, Rope
from novajax.models.families.registry import read_config
from novajax.models.sizes import model_sizes
from novajax.planner.hardware import Chip, Cluster
from novajax.planner.sizes import ModelSizes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def architecture(name: str) -> ModelConfig:
    """Llama 3.1 '8b', '70b' or '405b'."""
    return read_config(yaml.safe_load((CONFIGS / f"llama-3.1-{name}.yaml").read_text())["architecture"])


def tiny_config(layers: int = 4) -> ModelConfig:
    """embed 8, mlp 16, 4 query heads of 2 and 2 KV heads, vocab 32: a layer has 64+32+32+64 + 384 + 16 = 592 numbers."""
    return ModelConfig(
        family="llama",
        layers=(LayerKind(Rope(10_000.0), Dense(16)),) * layers,
        vocab=32,
        embed=8,
        heads=4,
        kv_heads=2,
        head_dim=2,
        max_context_tokens=1024,
        norm_eps=1e-5,
        activation="silu",
        attention_scale=2**-0.5,
    )


def tiny(layers: int = 4) -> ModelSizes:
    return model_sizes(tiny_config(layers))


def toy_chip(hbm_bytes: int = 1_000_000) -> Chip:
    """Rates that make arithmetic easy: 1 byte and 1 FLOP a nanosecond, NVLink a tenth, network a hundredth."""
    flop: dict = {"float32": 1e9, "bfloat16": 1e9, "int8": 2e9, "fp8": 2e9}
    return Chip(
        name="toy",
        hbm_bytes=hbm_bytes,
        hbm_bytes_per_s=1e9,
        flop_per_s=flop,
        nvlink_bytes_per_s=1e8,
        pcie_bytes_per_s=1e8,
        network_bytes_per_s=1e7,
        gpus_per_host=2,
        sources="made up",
    )


def toy_cluster(nodes: int = 1, gpus: int = 2, hbm_bytes: int = 1_000_000) -> Cluster:
    return Cluster(chip=toy_chip(hbm_bytes), nodes=nodes, gpus_per_host=gpus, network_bytes_per_s=1e7)
