"""Customs about prompts, which cannot be read from any model."""

from dla_hooks.residual.architecture import Architecture

ARCHITECTURES: tuple[Architecture, ...] = ()

# TransformerLens puts a BOS before every string, but for these types. One token more or less moves
# every number, so that code written for it needs the same custom.
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
