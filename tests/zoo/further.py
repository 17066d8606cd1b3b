"""Further architectures: most follow the rules of names, and some have made a rule necessary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from zoo.models import DEEPSEEK, EXPERTS, LINEAR_ATTENTION, MROPE, ROUTED, TEXT, VISION, Model, but

_TWO: Final = {"num_experts_per_tok": 2}
_MOE: Final = {**TEXT, **EXPERTS}
_LOCAL: Final = but(TEXT, "head_dim", num_local_experts=4, num_experts_per_tok=2)
_DEEP_MOE: Final = TEXT | {name: DEEPSEEK[name] for name in ROUTED}
_INDEXED: Final = {**DEEPSEEK, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8}
_MASKED: Final = but(TEXT, "num_key_value_heads", "head_dim", "tie_word_embeddings")
_ROPE_SECTIONS: Final = {**TEXT, "rope_parameters": but(MROPE, "mrope_interleaved")}
_GLM_ROPE: Final = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
        "partial_rotary_factor": 0.5,
    }
}
_GLM_VISION: Final = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 128,
    "patch_size": 14,
    "image_size": 28,
}


def _text(config: str, fields: Mapping[str, Any], model: str = "", **more: Any) -> Model:
    """A language model whose class is called as its config is."""
    return Model(config=config, model=model or config.replace("Config", "ForCausalLM"), fields=fields, **more)


def _composite(config: str, text: Mapping[str, Any], vision: Mapping[str, Any], *towers: str, **more: Any) -> Model:
    return Model(
        config=config,
        model=config.replace("Config", "ForConditionalGeneration"),
        fields={"text_config": text, "vision_config": vision, **more},
        towers=towers,
    )


def _of(model_type: str, base: Mapping[str, Any] = TEXT) -> dict[str, Any]:
    return {**base, "model_type": model_type}


def _masked(config: str, fields: Mapping[str, Any]) -> Model:
    return _text(config, fields, config.replace("Config", "ForMaskedLM"), inputs="masked")


FURTHER: Final[Mapping[str, Model]] = {
    "smollm3": _text("SmolLM3Config", TEXT),
    "olmo3": _text("Olmo3Config", but(TEXT, "head_dim")),
    "seed_oss": _text("SeedOssConfig", TEXT),
    "exaone4": _text("Exaone4Config", TEXT),
    "cohere2": _text("Cohere2Config", but(TEXT, tie_word_embeddings=True)),
    "glm4": _text("Glm4Config", TEXT),
    "starcoder2": _text("Starcoder2Config", but(TEXT, "head_dim")),
    "nemotron": _text("NemotronConfig", TEXT),
    "phi": _text("PhiConfig", but(TEXT, "head_dim")),
    "ernie4_5": _text("Ernie4_5Config", TEXT),
    "falcon": _text("FalconConfig", but(TEXT, "head_dim", "num_key_value_heads", new_decoder_architecture=True)),
    "opt": _text(
        "OPTConfig",
        {
            "vocab_size": 128, "hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 64, "word_embed_proj_dim": 128, "tie_word_embeddings": True,
        },
    ),
    "qwen3_5": _text("Qwen3_5TextConfig", {**TEXT, **LINEAR_ATTENTION}, "Qwen3_5ForCausalLM"),
    "gemma3n": _text(
        "Gemma3nTextConfig",
        but(
            TEXT, tie_word_embeddings=True, vocab_size_per_layer_input=128, hidden_size_per_layer_input=32,
            laurel_rank=32, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
            layer_types=["sliding_attention", "full_attention"],
        ),
        "Gemma3nForCausalLM",
    ),
    "jamba": _text(
        "JambaConfig",
        but(
            TEXT, "head_dim", num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=1, mamba_d_state=16, mamba_dt_rank=8, use_mamba_kernels=False,
        ),
    ),
    "bamba": _text(
        "BambaConfig",
        but(
            TEXT, "head_dim", mamba_n_heads=8, mamba_d_head=32, mamba_d_state=16, mamba_chunk_size=16,
            attn_layer_indices=[1],
        ),
    ),
    "falcon_h1": _text(
        "FalconH1Config",
        but(TEXT, mamba_n_heads=8, mamba_d_head=32, mamba_d_state=16, mamba_chunk_size=16, mamba_d_ssm=256),
    ),
    "lfm2": _text("Lfm2Config", but(TEXT, "head_dim", layer_types=["conv", "full_attention"])),
    "lfm2_moe": _text(
        "Lfm2MoeConfig", but(_MOE, "head_dim", num_dense_layers=1, layer_types=["conv", "full_attention"])
    ),
    "dots1": _text("Dots1Config", _DEEP_MOE),
    "mimo_v2": _text("MiMoV2FlashConfig", _DEEP_MOE),
    "afmoe": _text("AfmoeConfig", but(_MOE, num_dense_layers=1)),
    "flex_olmo": _text("FlexOlmoConfig", but(TEXT, "head_dim", num_experts=4, **_TWO)),
    "hunyuan_moe": _text("HunYuanMoEV1Config", but(TEXT, num_experts=4, moe_topk=2)),
    "granitemoeshared": _text("GraniteMoeSharedConfig", but(_LOCAL, shared_intermediate_size=128)),
    "deepseek_v32": _text("DeepseekV32Config", _INDEXED),
    "deepseek_v4": _text("DeepseekV4Config", DEEPSEEK),
    "glm_moe_dsa": _text("GlmMoeDsaConfig", _INDEXED),
    "glm4_moe_lite": _text("Glm4MoeLiteConfig", DEEPSEEK),
    "mistral4": _text("Mistral4Config", DEEPSEEK),
    "roberta": _masked("RobertaConfig", _MASKED),
    "distilbert": _masked(
        "DistilBertConfig", {"vocab_size": 128, "dim": 128, "hidden_dim": 256, "n_layers": 1, "n_heads": 4}
    ),
    "electra": _masked("ElectraConfig", but(_MASKED, embedding_size=128)),
    "mpnet": _masked("MPNetConfig", _MASKED),
    "t5": Model(
        config="T5Config",
        model="T5ForConditionalGeneration",
        fields={
            "vocab_size": 128, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 1, "num_heads": 4,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": True,
        },
        inputs="pair",
    ),
    "bart": Model(
        config="BartConfig",
        model="BartForConditionalGeneration",
        fields={
            "vocab_size": 128, "d_model": 128, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256,
            "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        inputs="pair",
    ),
    "llava": _composite(
        "LlavaConfig", _of("llama"), _of("clip_vision_model", VISION), "vision_tower", "multi_modal_projector"
    ),
    "mistral3": _composite(
        "Mistral3Config", _of("mistral"), _of("pixtral", but(VISION, head_dim=32)), "vision_tower",
        "multi_modal_projector",
    ),
    "internvl": _composite(
        "InternVLConfig", _of("qwen3"), _of("internvl_vision", but(VISION, image_size=[28, 28], patch_size=[14, 14])),
        "vision_tower", "multi_modal_projector",
    ),
    "qwen2_vl": _composite(
        "Qwen2VLConfig",
        _ROPE_SECTIONS,
        {"depth": 1, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        "visual",
    ),
    "glm4v": _composite("Glm4vConfig", {**TEXT, **_GLM_ROPE}, _GLM_VISION, "visual"),
    "glm4v_moe": _composite("Glm4vMoeConfig", {**_DEEP_MOE, **_GLM_ROPE}, _GLM_VISION, "visual"),
    "idefics3": _composite("Idefics3Config", _of("llama"), VISION, "vision_model", "connector", scale_factor=2),
    "smolvlm": _composite("SmolVLMConfig", _of("llama"), VISION, "vision_model", "connector", scale_factor=2),
    "paligemma": _composite(
        "PaliGemmaConfig",
        _of("gemma", but(TEXT, tie_word_embeddings=True)),
        _of("siglip_vision_model", but(VISION, projection_dim=128)),
        "vision_tower",
        "multi_modal_projector",
        projection_dim=128,
    ),
    "mllama": _composite(
        "MllamaConfig",
        but(TEXT, "head_dim", cross_attention_layers=[1]),
        {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0],
            "vision_output_dim": 128, "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1,
        },
        "vision_model",
        "multi_modal_projector",
    ),
    "llama4_vision": _composite(
        "Llama4Config",
        but(TEXT, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=256, intermediate_size=64),
        {
            "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "projector_input_dim": 128, "projector_output_dim": 128,
            "vision_output_dim": 128,
        },
        "vision_model",
        "multi_modal_projector",
    ),
    "voxtral": Model(
        config="VoxtralConfig",
        model="VoxtralForConditionalGeneration",
        fields={
            "text_config": _of("llama"),
            "audio_config": {
                "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_mel_bins": 80, "max_source_positions": 32,
            },
        },
        towers=("audio_tower", "multi_modal_projector"),
    ),
}  # fmt: skip
