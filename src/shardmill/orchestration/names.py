"""Names for people; names of files and tensors are foreign text."""

from __future__ import annotations

from typing import Any

from shardmill.core.markdown import plain


def shard_run_name(parameters: dict[str, Any]) -> str:
    """Name of the task run of a shard: which shard, of which model, with which scheme.

    The names of shard and model are foreign text.
    """
    label = parameters["job"].label
    return f"quantize {plain(parameters['shard'].name)}{f' of {label}' if label else ''}"
