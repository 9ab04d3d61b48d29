"""Conventions for prompts, which cannot be read from a model."""

from dla_hooks.residual.architecture import Architecture

ARCHITECTURES: tuple[Architecture, ...] = ()

# TransformerLens puts a BOS before every string, except for these types. One token more or less
# changes every number, so the same rule holds here.
WITHOUT_BOS = (
    "bloom",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "glm",
    "glm4_moe",
    "gpt_neox",
    "granite",
    "minimax_m2",
    "mpt",
    "phi",
    "phimoe",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "recurrent_gemma",
    "seed_oss",
    "smollm3",
    "starcoder2",
)
