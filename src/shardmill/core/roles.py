"""Default roles: modules that stay as they are unless the recipe names them, as a table with its reasons."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Role:
    """A kind of module that engines run dense."""

    name: str
    why: str
    leaves: frozenset[str] = frozenset()
    """Last components of the module name, lower case."""
    pattern: str | None = None
    """Expression searched in the lower-case module name."""
    anywhere: frozenset[str] = frozenset()
    """Components that give the role wherever they stand."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ROLES: Final[tuple[Role, ...]] = (
    Role(
        "vision or audio tower",
        "engines run it dense",
        anywhere=_words(
            "visual vision_tower vision_model vision_encoder embed_vision embed_audio audio_tower audio_encoder"
            " multi_modal_projector mm_projector merger vision_adapter vision_language_adapter patch_merger connector"
            " vision_projection modality_projection image_embed audio_embed img_processor resampler vpm apm"
            " mm_whisper_embeddings whisper_encoder speech_encoder sound_encoder vision_embedder mm_vision_tower"
        ),
        pattern=r"^mlp1\.",
    ),
    Role(
        "embedding",
        "engines load few quantized embeddings, and heads are tied to them",
        _words(
            "embed_tokens tok_embeddings word_embeddings position_embeddings token_type_embeddings embed_positions wte"
            " wpe embed_in embeddings pos_embed position_embedding embedding embed_tokens_per_layer"
            " relative_attention_bias rel_pos_bias shared"
        ),
    ),
    Role(
        "head",
        "accuracy, and heads are often tied",
        _words("lm_head embed_out output_layer proj_out classifier score"),
        r"^output$|^head$|(^|\.)shared_head\.|^cls\.",
    ),
    Role(
        "router",
        "a quantized router changes routing; engines keep it dense",
        _words("router shared_expert_gate"),
        r"(^|\.)(mlp|moe|block_sparse_moe|feed_forward|ffn|mixer)\.gate$|(^|\.)router\.",
    ),
    Role("norm", "not linear", pattern=r"(layer_?norm|rms_?norm)[^.]*$|norm(\d+|_f)?$|(^|\.)ln_\w+$"),
    Role(
        "convolution",
        "consumed as a convolution",
        _words("conv conv1d conv2d conv3d patch_embed patch_embedding"),
        r"_conv1d$|(^|\.)patch_embed(ding)?\.",
    ),
    Role(
        "state-space gate",
        "tiny and sensitive",
        _words("in_proj_a in_proj_b in_proj_ba dt_proj x_proj"),
        r"_decay$",
    ),
    Role(
        "multi-token prediction",
        "engines build this layer from the target's own config",
        _words("eh_proj enorm hnorm e_proj h_proj"),
        r"(^|\.)mtp(\.|$)",
    ),
    Role(
        "sensitive",
        "upstream recipes keep it dense",
        _words("weights_proj per_layer_input_gate per_layer_projection per_layer_model_projection"),
        r"_latent_proj$|(^|\.)indexer\.wk$|(^|\.)(altup(_\w+)?|laurel)\.",
    ),
)


TOWERS: Final = frozenset(word for role in ROLES for word in role.anywhere)
"""Components below which everything has a role."""


def has_digit_word(template: str) -> bool:
    """Tell whether names of a template may differ in role by a digit: the words of the table that have one.

    >>> has_digit_word("model.conv0d.weight"), has_digit_word("mlp0.0.weight"), has_digit_word("layers.00.w0.weight")
    (True, True, False)
    """
    lower = template.lower()
    return "conv0d" in lower or lower.startswith("mlp0.")


MTP: Final = "multi-token prediction"
"""The role that whole layers past the last one have, too; see `architectures.past_last_layer`."""


def role_named(name: str) -> Role:
    """The row of that name."""
    return next(role for role in ROLES if role.name == name)


def role_of(module: str, off: frozenset[str] = frozenset()) -> Role | None:
    """Return the first role whose table row fits the module, if any.

    Args:
        off: names of roles that are passed over.

    >>> role_of("model.layers.0.mlp.gate").name, role_of("model.layers.0.mlp.gate_proj")
    ('router', None)
    """
    lower = module.lower()
    parts = lower.split(".")
    for role in ROLES:
        if role.name in off:
            continue
        if parts[-1] in role.leaves or (role.anywhere and not role.anywhere.isdisjoint(parts)):
            return role
        if role.pattern and re.search(role.pattern, lower):
            return role
    return None
