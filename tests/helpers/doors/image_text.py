"""Tiny random models of every type that transformers maps to image-text models, and their inputs.

model = build("qwen3_vl")             # float64, eval mode, every parameter drawn at random
model(**text("qwen3_vl", model))      # ids alone
model(**pixels("qwen3_vl", model))    # as the type's processor would give them
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import mapping_zoo as zoo
import torch
from mapping_configs import HEADS, VOCAB, WIDTH
from mapping_zoo import CannotBuild
from media_zoo import (
    IMAGE,
    KINDS,
    START,
    TOP,
    asked,
    both_cases,
    build_class,
    noise,
    with_placeholders,
)
from transformers.models.auto import modeling_auto

from doors import Case, Door

CLASSES: Mapping[str, str] = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
MODEL_TYPES: tuple[str, ...] = tuple(sorted(CLASSES))
ENCODER_DECODERS = (
    "florence2",
    "pix2struct",
    "pp_formulanet",
    "t5gemma2",
    "udop",
    "vision-encoder-decoder",
)
"""Types whose decoder reads an encoder, in a sequence of its own."""

_VISION: Mapping[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "depth": 2,
    "hidden_size": 24,
    "embed_dim": 24,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "out_hidden_size": WIDTH,
    "text_hidden_size": WIDTH,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "num_patches": 16,
    "spatial_merge_size": 2,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "projection_dim": 24,
    "num_query_tokens": 4,
    "window_size": 16,
}
"""Fields of vision towers."""


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"text_config": {"rope_parameters": {**rope, **more}}}


_GLM = _mrope(2, 1, 1, partial_rotary_factor=1.0)
_FULL_HEADS = {"num_key_value_heads": HEADS}

_KOSMOS = {
    "embed_dim": WIDTH,
    "layers": 3,
    "ffn_dim": 48,
    "attention_heads": HEADS,
    "pad_token_id": 1,
}
_VIT = {
    "model_type": "vit",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
}
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": 3,
    "n_head": HEADS,
    "n_positions": 64,
    "add_cross_attention": True,
    "is_decoder": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
        "vision_config": {
            "sam_config": {
                "hidden_size": 24,
                "output_channels": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 4,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 8,
                "downsample_channels": [12, 24],
            },
            "encoder_config": {
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": VOCAB,
                "pad_token_id": None,
            },
        },
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "fuyu": {"patch_size": 4},
    "unlimited_ocr": {
        "vision_config": {
            "sam_config": {
                "output_channels": 8,
                "global_attn_indexes": [1],
                "window_size": 2,
                "mlp_dim": 8,
                "image_size": 64,
                "downsample_channels": [12, 24],
            },
            "encoder_config": {"image_size": 16, "patch_size": 4},
        }
    },
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "chameleon": {
        "vocabulary_map": {
            "<image>": IMAGE,
            **{f"IMGIMG{letter}Z": 8 + n for n, letter in enumerate("ABCDEF")},
        },
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "embed_dim": 8,
            "latent_channels": 8,
            "num_embeddings": 6,
            "num_res_blocks": 1,
            "resolution": 16,
        },
    },
    "janus": {
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "latent_channels": 8,
            "num_embeddings": 6,
            "num_res_blocks": 1,
            "projection_dim": 16,
            "image_token_embed_dim": 16,
        }
    },
    "vision-encoder-decoder": {"encoder": _VIT, "decoder": _GPT2},
    "fast_vlm": {"vision_config": {"architecture": "resnet10t", "hidden_size": 512}},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_tiny_patch16_224",
            "model_args": {
                "embed_dim": 24,
                "img_size": [16, 16],
                "patch_size": 4,
                "depth": 2,
                "num_heads": 2,
            },
        }
    },
    "florence2": {
        "vision_config": {
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [2, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [12, 24],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 4,
            "projection_dim": WIDTH,
        }
    },
    "pix2struct": {
        "text_config": {"d_kv": 8, "d_ff": 40},
        "vision_config": {
            "hidden_size": WIDTH,
            "patch_embed_hidden_size": 48,
            "d_kv": 16,
            "d_ff": 40,
            "seq_len": 64,
        },
    },
    "pp_formulanet": {
        "vision_config": {
            "output_channels": 8,
            "global_attn_indexes": [1],
            "window_size": 2,
            "mlp_dim": 40,
            "post_conv_in_channels": 8,
            "post_conv_mid_channels": 12,
            "post_conv_out_channels": 20,
            "decoder_hidden_size": WIDTH,
        }
    },
    "kosmos-2": {"latent_query_num": 4, "text_config": _KOSMOS},
    "kosmos-2.5": {"latent_query_num": 4, "text_config": _KOSMOS},
    "cosmos3_edge": _mrope(2, 2, 2),
    "deepseek_vl_hybrid": {
        "high_res_vision_config": {
            "output_channels": 8,
            "mlp_dim": 8,
            "global_attn_indexes": [1],
            "window_size": 2,
        }
    },
    "diffusion_gemma": {"text_config": {"top_k_experts": 2}},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 24},
        "audio_config": {"adapter_input_size": 24},
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": IMAGE,
            "<|extra_200|>": START,
            **{f"<|visual token {n:06d}|>": 8 + n for n in range(6)},
        },
        "vq_config": {
            "codebook_size": 6,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "temporal_downsample_factor": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
        },
    },
    "ernie4_5_vl_moe": {
        **_mrope(1, 1, 2),
        "text_config": {**_mrope(1, 1, 2)["text_config"], "moe_intermediate_size": [24, 16]},
    },
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm5_next": {"text_config": {**_FULL_HEADS, "index_kpool": 2, "qk_rope_head_dim": 0}},
    "inkling2": {
        "text_config": {
            "unpadded_vocab_size": VOCAB - 2,
            "swa_num_attention_heads": HEADS,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 12,
            "d_rel": 4,
            "rel_extent": 8,
            "n_layers_per_attn_res_block": 1,
        },
        "vision_config": {"posemb_grid_size": 8, "projection_hidden_dim": 40},
    },
    "nemotron_h_omni": {
        "vision_hidden_size": 24,
        "vision_config": {"video_temporal_patch_size": 2, "max_img_size": 32, "image_size": 16},
    },
    "kimi_k25": {"projection_hidden_size": 24},
    "llama4": {
        "vision_config": {
            "intermediate_size": 96,
            "vision_output_dim": 20,
            "projector_input_dim": 20,
            "projector_output_dim": 20,
        }
    },
    "paligemma": {"projection_dim": WIDTH},
    "glm_ocr": _GLM,
    "glmga": _GLM,
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "downsample_rate": "1/2",
        "image_grid_pinpoints": [[16, 16], [32, 16]],
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 2, 1, 1],
            }
        },
        "vision_config": {"max_image_size": 64},
    },
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 1],
            "num_global_layers": 1,
            "vision_output_dim": 72,
        },
    },
    "mistral4": {"head_dim": 10, **_FULL_HEADS},
    "mistral_large4": {"text_config": {"head_dim": 10, **_FULL_HEADS}},
    "molmo2": {
        "vision_config": {"image_size": [16, 16], "patch_size": 4},
        "image_patch_id": IMAGE,
        "adapter_config": {"vision_feature_layer": [1, 0], "hidden_size": 24},
    },
    "muse_glimmer": {"out_hidden_size": 96},
    "muse_spark": {
        "out_hidden_size": 96,
        "vision_config": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
        "audio_config": {
            "num_hidden_layers": 2,
            "patch_sizes": [4, 2],
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
        },
    },
    "paddleocr_vl": _mrope(2, 2, 2),
    "qwen2_5_omni_thinker": _mrope(2, 1, 1),
    "qwen2_5_vl": _mrope(2, 1, 1),
    "qwen2_vl": {**_mrope(2, 1, 1), "vision_config": {"hidden_size": WIDTH, "mlp_ratio": 2}},
}
"""What a type's config needs besides."""


def build(
    model_type: str, seed: int = 0, dtype: torch.dtype = torch.float64, attn: str | None = None
) -> Any:
    """A tiny model of this type, every parameter drawn anew from `seed`; or CannotBuild."""
    sizes = (TOP, _VISION, OVERRIDES)
    return build_class(model_type, CLASSES[model_type], sizes, seed, dtype, attn)


# Inputs


def text(model_type: str, model: Any, seed: int = 0) -> dict[str, Any]:
    """Token ids alone, and what the type's forward cannot do without."""
    ids = zoo.example_ids_any(model, seed=seed)
    if model_type != "kosmos-2":
        return {"input_ids": ids}
    return {  # which runs on no text alone
        "input_ids": ids,
        "image_embeds": torch.zeros(len(ids), 0, WIDTH, dtype=model.dtype),
        "image_embeds_position_mask": torch.zeros_like(ids),
    }


def pixels(model_type: str, model: Any, seed: int = 0) -> dict[str, Any]:
    """Two prompts with an image each, as the type's processor gives them; or CannotBuild."""
    arguments = set(inspect.signature(type(model).forward).parameters)
    generator = torch.Generator().manual_seed(100 + seed)
    given = FORMS.get(model_type, _form(arguments))(model, generator)
    if given is None:
        raise CannotBuild(f"{model_type}: its forward takes no pixels")
    n_features = given.pop("n_features", None)
    given = {
        name: value.to(model.dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in given.items()
    }
    if n_features is None:
        n_features = asked(model, given)
    ids = with_placeholders(zoo.example_ids_any(model, seed=seed), n_features)
    found = {"input_ids": ids, **given}
    for name in KINDS:
        if name in arguments:
            found[name] = (ids == IMAGE).long()
    if model_type.startswith("kosmos"):
        found["image_embeds_position_mask"] = (ids == IMAGE).long()
    return found


def _nothing(model: Any, generator: torch.Generator) -> None:
    """Text alone is all that its forward takes, of what this door brings."""


def _square(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": noise(generator, 2, 3, 16, 16)}


def _tiles(n: int) -> Any:
    """An image that is cut into tiles [image, tile, 3, height, width]."""

    def form(model: Any, generator: torch.Generator) -> dict[str, Any]:
        return {"pixel_values": noise(generator, 2, n, 3, 16, 16)}

    return form


def _sizes(form: Any) -> Any:
    def sized(model: Any, generator: torch.Generator) -> dict[str, Any]:
        return {**form(model, generator), "image_sizes": torch.tensor([[16, 16], [16, 16]])}

    return sized


def _grid(height: int = 4, width: int = 4) -> Any:
    """Patches in rows, as Qwen's processor gives them, with a grid for each image."""

    def form(model: Any, generator: torch.Generator) -> dict[str, Any]:
        vision = model.config.vision_config
        channels = getattr(vision, "in_channels", getattr(vision, "num_channels", 3))
        size = vision.patch_size
        names = ("temporal_patch_size", "patch_temporal")
        depth = next((getattr(vision, name) for name in names if hasattr(vision, name)), 1)
        patches = noise(generator, 2 * height * width, channels * depth * size * size)
        return {
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, height, width]] * 2),
        }

    return form


def _both_sizes(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "pixel_values": noise(generator, 2, 3, 16, 16),
        "high_res_pixel_values": noise(generator, 2, 3, 16, 16),
    }


def _rows_of_patches(name: str = "spatial_shapes", **more: Any) -> Any:
    """Flat patches [image, patch, channels] of images of four by four."""

    def form(model: Any, generator: torch.Generator) -> dict[str, Any]:
        sizes = {name: torch.tensor([[4, 4], [4, 4]])} if name else {}
        return {"pixel_values": noise(generator, 2, 16, 48), **sizes, **more}

    return form


def _placed_patches(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Flat patches with the place of each [image, patch, 2], as Gemma 4 has them."""
    vision = model.config.vision_config
    side = 4
    size = getattr(vision, "model_patch_size", vision.patch_size)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
    return {
        "pixel_values": noise(generator, 2, side * side, 3 * size * size),
        "image_position_ids": places.expand(2, -1, -1).contiguous(),
    }


def _cubes(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Patches [patch, channels, height, width], with a grid for each image."""
    return {
        "pixel_values": noise(generator, 32, 3, 4, 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def _flat_grid(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Patches without time, with a grid for each image."""
    return {
        "pixel_values": noise(generator, 32, 48),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def _merged_patches(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Squares of two by two patches, channels last, with a grid of squares for each image."""
    return {
        "pixel_values": noise(generator, 8, 8, 8, 3),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 2),
    }


def _merged_grid(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {**_flat_grid(model, generator), "image_merge_sizes": torch.tensor([2, 2])}


def _mllama(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """One image of two tiles each; a mask says which tokens read which tile."""
    mask = torch.ones(2, 10, 1, 4, dtype=torch.long)
    mask[:, :3] = 0  # ahead of the image nothing reads it
    mask[1, :, :, 1] = 0
    return {
        "pixel_values": noise(generator, 2, 1, 4, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
        "cross_attention_mask": mask,
        "n_features": 1,
    }


def _idefics(model: Any, generator: torch.Generator) -> dict[str, Any]:
    mask = torch.ones(2, 10, 1, dtype=torch.long)
    mask[:, :3] = 0
    return {
        "pixel_values": noise(generator, 2, 1, 3, 16, 16),
        "image_attention_mask": mask,
        "n_features": 1,
    }


def _with_query(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """An image with a question for the Q-Former."""
    return {
        "pixel_values": noise(generator, 2, 3, 16, 16),
        "qformer_input_ids": torch.randint(5, 60, (2, 3), generator=generator),
    }


def _with_query_of_frames(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        **_with_query(model, generator),
        "pixel_values": noise(generator, 2, 4, 3, 16, 16),
    }


def _molmo(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """One crop an image, of four pools of four patches each."""
    pools = torch.arange(16).reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    return {
        "pixel_values": noise(generator, 2, 16, 48),
        "image_token_pooling": torch.cat((pools, pools + 16)),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * 2),
        "image_num_crops": torch.tensor([1, 1]),
    }


def _radio(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "pixel_values": noise(generator, 32, 48),
        "image_grid_hw": torch.tensor([[4, 4]] * 2),
        "n_features": 4,
    }


def _masked_tiles(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "pixel_values": noise(generator, 2, 1, 3, 16, 16),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    }


def _minicpm(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Two images side by side, one row of pixels, eight by eight patches each."""
    return {
        "pixel_values": noise(generator, 1, 3, 4, 128 * 4),
        "target_sizes": torch.tensor([[8, 8], [8, 8]], dtype=torch.int32),
    }


def _large_square(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": noise(generator, 2, 3, 64, 64)}


def _kosmos(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {**_square(model, generator), "n_features": 4}


def _flat_with_places(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Patches with their row and column ahead of their pixels."""
    return {"flattened_patches": _placed(generator), "n_features": 4}


def _placed(generator: torch.Generator) -> torch.Tensor:
    """Patches [image, patch, 2 + channels] of two images of four by four."""
    places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).double()
    return torch.cat((places.expand(2, -1, -1), noise(generator, 2, 16, 48)), dim=-1)


def _with_decoder(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """What the encoder reads, and the decoder's tokens so far."""
    arguments = inspect.signature(type(model).forward).parameters
    found: dict[str, Any] = {"decoder_input_ids": torch.tensor([[2, 11, 12, 13], [2, 14, 15, 16]])}
    if "flattened_patches" in arguments:
        return found | {
            "flattened_patches": _placed(generator),
            "attention_mask": torch.ones(2, 16),
        }
    if model.config.model_type == "florence2":
        ids = with_placeholders(zoo.example_ids_any(model), 17)
        return found | {"input_ids": ids, "pixel_values": noise(generator, 2, 3, 16, 16)}
    if "input_ids" in arguments and model.config.model_type != "pp_formulanet":
        found["input_ids"] = torch.randint(5, VOCAB - 8, (2, 6), generator=generator)
    else:
        found["pixel_values"] = noise(generator, 2, 3, 16, 16)
    if "bbox" in arguments:
        found["bbox"] = noise(generator, 2, 6, 4).sigmoid()
    return found


def _fuyu(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": noise(generator, 2, 4, 48)}


def _form(arguments: set[str]) -> Any:
    """What the arguments of a forward suggest."""
    if "image_grid_thw" in arguments:
        return _grid()
    if "image_sizes" in arguments:
        return _sizes(_square)
    return _square


FORMS: Mapping[str, Any] = {
    "deepseek_vl_hybrid": _both_sizes,
    "diffusion_gemma": _placed_patches,
    "deepseek_ocr2": _large_square,
    "evolla": _nothing,
    "mistral4": _nothing,
    "internvl": _square,
    "fast_vlm": _large_square,
    "fuyu": _fuyu,
    "gemma4": _placed_patches,
    "gemma4_unified": _placed_patches,
    "granite4_vision": _sizes(_tiles(2)),
    "granite_docling": _masked_tiles,
    "hunyuan_vl": _flat_grid,
    "idefics": _idefics,
    "idefics2": _tiles(1),
    "idefics3": _tiles(1),
    "inkling2": _merged_patches,
    "instructblip": _with_query,
    "instructblipvideo": _with_query_of_frames,
    "kosmos-2": _kosmos,
    "kosmos-2.5": _flat_with_places,
    "kimi_k25": _cubes,
    "lfm2_vl": _rows_of_patches(pixel_attention_mask=torch.ones(2, 16, dtype=torch.long)),
    "llava": _square,
    "llava_next": _sizes(_tiles(2)),
    "llava_next_video": _sizes(_tiles(2)),
    "llava_onevision": _sizes(_tiles(2)),
    "minicpm_ocr": _minicpm,
    "minicpmv4_6": _minicpm,
    "minicpmv4_7": _minicpm,
    "mllama": _mllama,
    "molmo2": _molmo,
    "nemotron_h_omni": _radio,
    "paddleocr_vl": _cubes,
    "perception_lm": _tiles(1),
    "smolvlm": _tiles(1),
    "unlimited_ocr": _large_square,
    "video_llama_3": _merged_grid,
}
"""What the pixels of a type look like, where it is no square image."""


def _cases(
    model_type: str, seed: int = 0, attn: str | None = None, **changes: Any
) -> tuple[Case, ...]:
    """Text alone, and with pixels, as far as the type takes them."""
    model = build(model_type, seed, attn=attn, **changes)
    if model_type in ENCODER_DECODERS:
        given = _with_decoder(model, torch.Generator().manual_seed(seed))
        return both_cases(model, ("an encoder-decoder", lambda: given))
    if model_type == "pi0":  # it has no logits that an attribution could be held against
        return (Case(model, text(model_type, model, seed), torch.zeros(2, 7, VOCAB)),)
    return both_cases(
        model,
        ("text alone", lambda: text(model_type, model, seed)),
        ("with pixels", lambda: pixels(model_type, model, seed)),
    )


DOORS = (
    Door(
        name="image-text",
        title="Image-text",
        about="Every type that transformers maps to image-text-to-text, with text alone and with "
        "pixels as its processor gives them.",
        model_types=MODEL_TYPES,
        cases=_cases,
        rank=2,
        in_ci=8,
    ),
)
