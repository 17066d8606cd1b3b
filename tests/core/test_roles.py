from __future__ import annotations

import pytest

from shardmill.core.roles import ROLES, role_of


@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("model.embed_tokens", "embedding"),
        ("transformer.wte", "embedding"),
        ("bert.embeddings.word_embeddings", "embedding"),
        ("lm_head", "head"),
        ("head", "head"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "embedding"),
        ("model.shared", "embedding"),
        ("mlp1.1", "vision or audio tower"),
        ("model.connector.modality_projection.proj", "vision or audio tower"),
        ("model.layers.0.altup.correction_coefs", "sensitive"),
        ("model.layers.0.laurel.linear_left", "sensitive"),
        ("model.altup_projections.0", "sensitive"),
        ("output", "head"),
        ("cls.predictions.decoder", "head"),
        ("model.layers.61.shared_head.head", "head"),
        ("model.layers.0.mlp.gate", "router"),
        ("model.layers.0.block_sparse_moe.gate", "router"),
        ("model.layers.0.mlp.router", "router"),
        ("model.layers.0.block_sparse_moe.router.layer", "router"),
        ("model.layers.0.mlp.shared_expert_gate", "router"),
        ("backbone.layers.1.mixer.gate", "router"),
        ("model.layers.0.input_layernorm", "norm"),
        ("encoder.layer.0.attention.output.LayerNorm", "norm"),
        ("model.norm_f", "norm"),
        ("transformer.h.0.ln_1", "norm"),
        ("model.layers.0.self_attn.q_norm", "norm"),
        ("visual.blocks.0.norm1", "vision or audio tower"),
        ("model.visual.merger.mlp.0", "vision or audio tower"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", "vision or audio tower"),
        ("multi_modal_projector.linear_1", "vision or audio tower"),
        ("model.layers.0.linear_attn.conv1d", "convolution"),
        ("model.layers.0.self_attn.q_conv1d", "convolution"),
        ("model.layers.0.linear_attn.in_proj_ba", "state-space gate"),
        ("model.layers.61.eh_proj", "multi-token prediction"),
        ("mtp.fc", "multi-token prediction"),
        ("mtp.layers.0.self_attn.q_proj", "multi-token prediction"),
        ("model.layers.0.self_attn.indexer.weights_proj", "sensitive"),
        ("model.layers.0.self_attn.indexer.wk", "sensitive"),
    ],
)
def test_what_engines_run_dense_has_a_role(module: str, role: str) -> None:
    found = role_of(module)
    assert found is not None
    assert found.name == role


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.kv_b_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.experts.7.gate_proj",
        "model.layers.0.mlp.shared_experts.up_proj",
        "model.layers.0.block_sparse_moe.experts.0.w1",
        "model.layers.0.self_attn.out_proj",
        "model.layers.0.linear_attn.in_proj_qkvz",
        "backbone.layers.0.mixer.in_proj",
        "encoder.layer.0.attention.output.dense",
        "model.layers.0.attention.wo",
        "model.layers.0.self_attn.normalizer_proj",
        "model.layers.0.mlp.output",
        "model.layers.0.mlp1.fc",
        "model.layers.0.attention.head",
    ],
)
def test_ordinary_linear_layers_have_none(module: str) -> None:
    assert role_of(module) is None


def test_every_role_says_why() -> None:
    assert all(role.why for role in ROLES)
    assert len({role.name for role in ROLES}) == len(ROLES)
