"""Tiny models of many architectures with random weights, written by transformers' own `save_pretrained`.

So names and layouts are those that transformers writes for the real ones. Every width is a multiple of 32, most of 128.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TEXT: Final = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: Final = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
VISION: Final = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LATENT: Final = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
MROPE: Final = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [4, 6, 6],
    "mrope_interleaved": True,
}


def but(base: Mapping[str, Any], *without: str, **changes: Any) -> dict[str, Any]:
    """A base without some fields and with others."""
    return {key: value for key, value in base.items() if key not in without} | changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """How a checkpoint of one architecture is made."""

    config: str
    model: str
    fields: Mapping[str, Any]
    rework: Callable[[Path], None] | None = None
    """Changes the written folder into the layout in which the real models are published."""
    inputs: str = "text"
    """`text`, `masked`, `pair` or `speech`."""
    towers: tuple[str, ...] = ()
    """Components of names below which everything is an image or sound tower or projector."""


def _transposed_experts(folder: Path) -> None:
    """As Qwen3-VL-MoE is published: gate_up_proj [E, hidden, 2I], down_proj [E, I, hidden]."""
    _rewrite(folder, lambda name, t: {name: t.transpose(1, 2).contiguous() if ".mlp.experts." in name else t})


def _with_mtp_layer(folder: Path) -> None:
    """As DeepSeek-V3 is published: one more layer than `num_hidden_layers`, with what glues it to the model."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    last = config["num_hidden_layers"]
    generator = torch.Generator().manual_seed(5)
    copied = {
        name.replace(f"layers.{last - 1}.", f"layers.{last}."): tensor.clone()
        for name, tensor in tensors.items()
        if f"layers.{last - 1}." in name
    }
    glue = {
        "eh_proj.weight": (128, 256),
        "enorm.weight": (128,),
        "hnorm.weight": (128,),
        "shared_head.head.weight": (128, 128),
    }
    copied |= {
        f"model.layers.{last}.{name}": torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in glue.items()
    }
    save_file(tensors | copied, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


_CONSOLIDATED: Final = {
    "model.": "",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn": "attention",
    "mlp": "feed_forward",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attention_norm",
}


def consolidated_name(name: str) -> str:
    """The name that a tensor has in Mistral's own format."""
    for there, here in _CONSOLIDATED.items():
        name = name.replace(there, here)
    return name


def _consolidated(folder: Path) -> None:
    """As Mistral publishes: names of its own, params.json beside config.json."""
    _rewrite(folder, lambda name, tensor: {consolidated_name(name): tensor})
    (folder / "params.json").write_text(json.dumps({"dim": 128, "n_layers": 2, "vocab_size": 128}))


def _rewrite(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= change(name, tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


_MOE: Final = {**TEXT, **EXPERTS}
DEEPSEEK: Final = {
    **but(TEXT, "head_dim", num_key_value_heads=4),
    **LATENT,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
ROUTED: Final = (
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
)
_MROPE_TEXT: Final = {**TEXT, "rope_parameters": MROPE}
_QWEN3_VISION: Final = {
    "depth": 1,
    "hidden_size": 64,
    "out_hidden_size": 128,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
LINEAR_ATTENTION: Final = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA_HYBRID: Final = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "layer_types": ["mamba", "attention"],
}

MODELS: Final[Mapping[str, Model]] = {
    "llama": Model(config="LlamaConfig", model="LlamaForCausalLM", fields=TEXT),
    "llama_tied": Model(config="LlamaConfig", model="LlamaForCausalLM", fields=but(TEXT, tie_word_embeddings=True)),
    "mistral": Model(config="MistralConfig", model="MistralForCausalLM", fields=TEXT),
    "mistral_consolidated": Model(
        config="MistralConfig", model="MistralForCausalLM", fields=TEXT, rework=_consolidated
    ),
    "qwen2": Model(config="Qwen2Config", model="Qwen2ForCausalLM", fields=but(TEXT, "head_dim")),
    "qwen3": Model(config="Qwen3Config", model="Qwen3ForCausalLM", fields=TEXT),
    "gemma2": Model(config="Gemma2Config", model="Gemma2ForCausalLM", fields=but(TEXT, tie_word_embeddings=True)),
    "phi3": Model(config="Phi3Config", model="Phi3ForCausalLM", fields=but(TEXT, "head_dim")),
    "granite": Model(config="GraniteConfig", model="GraniteForCausalLM", fields=but(TEXT, "head_dim")),
    "olmo2": Model(config="Olmo2Config", model="Olmo2ForCausalLM", fields=but(TEXT, "head_dim")),
    "gpt_neox": Model(
        config="GPTNeoXConfig",
        model="GPTNeoXForCausalLM",
        fields=but(TEXT, "head_dim", "num_key_value_heads"),
    ),
    "qwen2_moe": Model(
        config="Qwen2MoeConfig",
        model="Qwen2MoeForCausalLM",
        fields=but(_MOE, "head_dim", shared_expert_intermediate_size=128),
    ),
    "qwen3_moe": Model(config="Qwen3MoeConfig", model="Qwen3MoeForCausalLM", fields=but(_MOE, mlp_only_layers=[1])),
    "qwen3_next": Model(
        config="Qwen3NextConfig",
        model="Qwen3NextForCausalLM",
        fields={**_MOE, "shared_expert_intermediate_size": 64, **LINEAR_ATTENTION},
    ),
    "qwen3_5_moe": Model(
        config="Qwen3_5MoeTextConfig",
        model="Qwen3_5MoeForCausalLM",
        fields={**_MOE, "shared_expert_intermediate_size": 64, **LINEAR_ATTENTION},
    ),
    "mixtral": Model(
        config="MixtralConfig",
        model="MixtralForCausalLM",
        fields=but(TEXT, num_local_experts=4, num_experts_per_tok=2),
    ),
    "phimoe": Model(
        config="PhimoeConfig",
        model="PhimoeForCausalLM",
        fields=but(TEXT, "head_dim", num_local_experts=4, num_experts_per_tok=2),
    ),
    "olmoe": Model(
        config="OlmoeConfig",
        model="OlmoeForCausalLM",
        fields=but(TEXT, "head_dim", num_experts=4, num_experts_per_tok=2),
    ),
    "ernie4_5_moe": Model(
        config="Ernie4_5_MoeConfig",
        model="Ernie4_5_MoeForCausalLM",
        fields=but(
            TEXT,
            "head_dim",
            moe_intermediate_size=64,
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
            moe_layer_end_index=1,
        ),
    ),
    "deepseek_v2": Model(
        config="DeepseekV2Config",
        model="DeepseekV2ForCausalLM",
        fields=but(DEEPSEEK, q_lora_rank=None, topk_method="greedy"),
    ),
    "deepseek_v3": Model(config="DeepseekV3Config", model="DeepseekV3ForCausalLM", fields=DEEPSEEK),
    "deepseek_v3_mtp": Model(
        config="DeepseekV3Config", model="DeepseekV3ForCausalLM", fields=DEEPSEEK, rework=_with_mtp_layer
    ),
    "glm4_moe": Model(
        config="Glm4MoeConfig",
        model="Glm4MoeForCausalLM",
        fields=TEXT | {name: DEEPSEEK[name] for name in ROUTED},
    ),
    "kimi_linear": Model(
        config="KimiLinearConfig",
        model="KimiLinearForCausalLM",
        fields={
            **but(DEEPSEEK, "n_group", "topk_group", q_lora_rank=None, num_experts=4, num_shared_experts=1),
            "linear_attn_config": {
                "kda_layers": [1],
                "full_attn_layers": [2],
                "num_heads": 4,
                "head_dim": 32,
                "short_conv_kernel_size": 4,
            },
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "gpt_oss": Model(
        config="GptOssConfig",
        model="GptOssForCausalLM",
        fields=but(TEXT, num_local_experts=4, num_experts_per_tok=2),
    ),
    "llama4": Model(
        config="Llama4TextConfig",
        model="Llama4ForCausalLM",
        fields=but(TEXT, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=256, intermediate_size=64),
    ),
    "granitemoe": Model(
        config="GraniteMoeConfig",
        model="GraniteMoeForCausalLM",
        fields=but(TEXT, "head_dim", num_local_experts=4, num_experts_per_tok=2),
    ),
    "granitemoehybrid": Model(
        config="GraniteMoeHybridConfig",
        model="GraniteMoeHybridForCausalLM",
        fields=but(TEXT, "head_dim", num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=128)
        | _MAMBA_HYBRID,
    ),
    "minimax": Model(
        config="MiniMaxConfig",
        model="MiniMaxForCausalLM",
        fields=but(
            TEXT, num_local_experts=4, num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"]
        ),
    ),
    "minimax_m2": Model(
        config="MiniMaxM2Config",
        model="MiniMaxM2ForCausalLM",
        fields=but(TEXT, num_local_experts=4, num_experts_per_tok=2),
    ),
    "nemotron_h": Model(
        config="NemotronHConfig",
        model="NemotronHForCausalLM",
        fields=but(
            TEXT,
            "num_hidden_layers",
            layers_block_type=["mamba", "moe", "attention"],
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            n_shared_experts=1,
            moe_shared_expert_intermediate_size=64,
            mamba_num_heads=8,
            mamba_head_dim=32,
            ssm_state_size=16,
            n_groups=1,
            chunk_size=16,
            n_group=1,
            topk_group=1,
        ),
    ),
    "mamba2": Model(
        config="Mamba2Config",
        model="Mamba2ForCausalLM",
        fields={
            "vocab_size": 128,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 32,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "expand": 2,
            "tie_word_embeddings": False,
            "initializer_range": 0.06,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "gemma3_vision": Model(
        config="Gemma3Config",
        model="Gemma3ForConditionalGeneration",
        fields={
            "text_config": but(TEXT, tie_word_embeddings=True),
            "vision_config": {**VISION, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": 127,
            "initializer_range": 0.06,
        },
        towers=("vision_tower", "multi_modal_projector"),
    ),
    "qwen2_5_vl": Model(
        config="Qwen2_5_VLConfig",
        model="Qwen2_5_VLForConditionalGeneration",
        fields={
            "text_config": {
                **TEXT,
                "rope_parameters": but(MROPE, "mrope_interleaved"),
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 2,
                "out_hidden_size": 128,
                "patch_size": 14,
                "fullatt_block_indexes": [0],
            },
            "tie_word_embeddings": False,
        },
        towers=("visual",),
    ),
    "qwen3_vl": Model(
        config="Qwen3VLConfig",
        model="Qwen3VLForConditionalGeneration",
        fields={"text_config": _MROPE_TEXT, "vision_config": _QWEN3_VISION, "tie_word_embeddings": False},
        towers=("visual",),
    ),
    "qwen3_vl_moe": Model(
        config="Qwen3VLMoeConfig",
        model="Qwen3VLMoeForConditionalGeneration",
        fields={
            "text_config": {**_MROPE_TEXT, **EXPERTS},
            "vision_config": _QWEN3_VISION,
            "tie_word_embeddings": False,
        },
        towers=("visual",),
    ),
    "qwen3_vl_moe_hub": Model(
        config="Qwen3VLMoeConfig",
        model="Qwen3VLMoeForConditionalGeneration",
        fields={
            "text_config": {**_MROPE_TEXT, **EXPERTS},
            "vision_config": _QWEN3_VISION,
            "tie_word_embeddings": False,
        },
        rework=_transposed_experts,
        towers=("visual",),
    ),
    "whisper": Model(
        config="WhisperConfig",
        model="WhisperForConditionalGeneration",
        fields={
            "vocab_size": 128,
            "d_model": 128,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 256,
            "decoder_ffn_dim": 256,
            "num_mel_bins": 80,
            "max_source_positions": 32,
            "max_target_positions": 32,
            "init_std": 0.06,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        inputs="speech",
    ),
    "bert": Model(
        config="BertConfig",
        model="BertForMaskedLM",
        fields=but(TEXT, "num_key_value_heads", "head_dim", "tie_word_embeddings"),
        inputs="masked",
    ),
    "modernbert": Model(
        config="ModernBertConfig",
        model="ModernBertForMaskedLM",
        fields=but(TEXT, "num_key_value_heads", "head_dim", "tie_word_embeddings", cls_token_id=1, sep_token_id=2),
        inputs="masked",
    ),
    "gpt2": Model(
        config="GPT2Config",
        model="GPT2LMHeadModel",
        fields={
            "vocab_size": 128,
            "n_positions": 64,
            "n_embd": 128,
            "n_layer": 1,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def build(spec: Model, folder: Path) -> Any:
    """Write a checkpoint in BF16 and return the model that it was written from."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, spec.config)(**spec.fields)
    model = getattr(transformers, spec.model)(config).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # rotations of a vision tower are complex
            tensor.data = tensor.data.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            _fill(parameter, generator)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    if spec.rework is not None:
        spec.rework(folder)
    return model


def _fill(parameter: Tensor, generator: torch.Generator) -> None:
    """Give vectors and stacks some values, where they were all alike."""
    noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    if parameter.dim() <= 1:
        parameter += 0.05 * noise
    elif parameter.dim() == 3 or parameter.float().std() < 1e-4 or not parameter.float().isfinite().all():
        parameter.copy_(0.06 * noise)
