"""Where a module stands in a model: its stack of layers, its layer, its expert, and the part that it belongs to.

Told by names alone, for tables and pictures; nothing is decided by it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from shardmill.core.roles import role_of

EXPERTS: Final = "experts"
OTHER: Final = "other"
_NUMBERED: Final = re.compile(r"(.*?)\.(\d{1,6})(?=\.|$)", re.DOTALL)
_EXPERT: Final = re.compile(r"(^|\.)experts\.(\d{1,6})(?=\.|$)")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORDS: Final = (
    (EXPERTS, _words("experts")),
    ("shared experts", _words("shared_expert shared_experts shared_mlp")),
    (
        "attention",
        _words(
            "self_attn attn attention self_attention cross_attn linear_attn encoder_attn q_proj k_proj v_proj o_proj"
            " qkv_proj wq wk wv wo"
        ),
    ),
    ("state space", _words("mamba mixer ssm")),
    ("feed-forward", _words("mlp feed_forward ffn gate_proj up_proj down_proj gate_up_proj fc1 fc2 w1 w2 w3")),
)
"""Parts and the components of a name that give them; the first row that fits counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a module of a numbered layer stands."""

    stack: str
    """What stands before the number of the layer."""
    layer: int
    module: str
    """What stands behind it, an expert's number written as `*`."""
    expert: int | None = None


def place_of(module: str) -> Place | None:
    """Find the layer of a module; None for one outside of numbered layers.

    >>> place_of("model.layers.7.self_attn.q_proj").module
    'self_attn.q_proj'
    >>> found = place_of("model.layers.7.mlp.experts.12.up_proj")
    >>> found.layer, found.expert, found.module
    (7, 12, 'mlp.experts.*.up_proj')
    >>> place_of("lm_head") is None
    True
    """
    found = _NUMBERED.match(module)
    if found is None:
        return None
    rest = module[found.end() + 1 :]
    expert = _EXPERT.search(rest)
    if expert is not None:
        rest = f"{rest[: expert.start(2)]}*{rest[expert.end(2) :]}"
    return Place(
        stack=found[1], layer=int(found[2]), module=rest, expert=int(expert[2]) if expert is not None else None
    )


def part_of(module: str) -> str:
    """Name the part of the model that a module belongs to.

    >>> [part_of(f"model.layers.0.{name}") for name in ("mlp.experts.3.w1", "self_attn.q_proj", "input_layernorm")]
    ['experts', 'attention', 'norm']
    >>> part_of("model.embed_tokens"), part_of("x")
    ('embedding', 'other')
    """
    role = role_of(module)
    if role is not None:
        return role.name
    components = module.lower().split(".")
    return next((part for part, words in _WORDS if not words.isdisjoint(components)), OTHER)
