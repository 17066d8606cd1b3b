"""shardmill quantizes sharded safetensors checkpoints without a model definition, shard by shard.

The four functions are those of llm-compressor's `model_free` entry point, with the same parameters and results. They
are imported on first use, so that `import shardmill` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardmill.api import process_file, process_file_microscale_scheme, split_fused_moe_experts, validate_file

__version__ = "0.1.0"
__all__ = ["__version__", "process_file", "process_file_microscale_scheme", "split_fused_moe_experts", "validate_file"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from shardmill import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
