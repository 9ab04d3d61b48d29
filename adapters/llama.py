"""The Llama shape: two sublayers per block, each added to the stream as it comes out.

Pre-norm and rotary. What differs between these families (kind of norm, experts, sinks, biases,
embedding scales, parallel or sequential blocks) is seen in the model itself.
"""

from dla_hooks.architecture import Architecture, Heads, Write

_WRITES = (
    Write("attn_out", "self_attn", heads=Heads("self_attn.o_proj")),
    Write("mlp_out", "mlp"),
)

ARCHITECTURES = (
    Architecture(
        model_types=(
            "llama",
            "gemma",
            "gpt_oss",
            "mistral",
            "olmo",
            "phi3",
            "qwen2",
            "qwen3",
            "qwen3_moe",
            "stablelm",
            "starcoder2",
        ),
        layers="model.layers",
        final_norm="model.norm",
        writes=_WRITES,
    ),
    Architecture(
        model_types=("mixtral",),
        layers="model.layers",
        final_norm="model.norm",
        writes=(
            Write("attn_out", "self_attn", heads=Heads("self_attn.o_proj")),
            # The second name is that of transformers 4.
            Write("mlp_out", ("mlp", "block_sparse_moe")),
        ),
    ),
    Architecture(
        model_types=("cohere",),
        layers="model.layers",
        final_norm="model.norm",
        writes=_WRITES,
        logit_scale="logit_scale",
    ),
)
