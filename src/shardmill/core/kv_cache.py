"""Scales of the key and value cache that a source brings along: a config may speak of them only where they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from shardmill.core.plan import SourceShard
from shardmill.errors import Problem

_SCALES: Final = ("k_scale", "v_scale")
_ATTENTION: Final = re.compile(r"^(.*(?:self_attn|attention|attn))(?:\.attn)?\.(?:k_proj\.|v_proj\.)?([kv]_scale)$")


def check_kv_scales(shards: Iterable[SourceShard]) -> list[Problem]:
    """Find what stands against a quantized cache: no attention layer, or one, without both of its scales.

    Without them engines would run with a scale of 1, silently.
    """
    found: dict[str, set[str]] = {}
    place: dict[str, str] = {}
    for shard in shards:
        for spec in shard.header.tensors:
            if scale := _ATTENTION.match(spec.name):
                found.setdefault(scale[1], set()).add(scale[2])
                place[scale[1]] = shard.name
            elif spec.name.endswith((".k_proj.weight", ".wk.weight")):
                layer = spec.name.rsplit(".", 2)[0]
                found.setdefault(layer, set())
                place.setdefault(layer, shard.name)
    lacking = [layer for layer, scales in sorted(found.items()) if len(scales) < len(_SCALES)]
    if found and not lacking:
        return []
    layer = lacking[0] if lacking else ""
    return [
        Problem(
            file=place.get(layer, ""),
            tensor=layer,
            kind="kv-scales-missing",
            message=f"kv_cache needs k_scale and v_scale of every attention layer; {len(lacking)} layers lack them",
            way_out="leave kv_cache out of the recipe, or take a checkpoint that was calibrated",
        )
    ]
