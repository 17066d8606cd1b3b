"""What is written for consumers, and how good it has to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

MARGIN: Final = 1.02
"""By how much a perplexity may pass its limit."""
FAR_OFF: Final = 50.0
"""Perplexity over that of BF16 in the negative control, at least: a model that has lost its language."""

NATIVE: Final = "native"
TEST_KERNELS: Final = "test kernels"
"""vLLM has no kernel for the format on CPU; see `cpu_kernels`."""
EMULATION: Final = "vLLM's emulation"
"""The same, and vLLM has an emulation, which it offers on accelerators; on CPU a test lets it choose that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One format of the example checkpoint, whose matrices have 576, 192 and 1536 columns."""

    name: str
    recipe: Mapping[str, Any]
    limit: float = 0.0
    """Of perplexity in vLLM over that of the source: what llm-compressor's result had on another text."""
    kernels: str = ""
    """What computes in vLLM on CPU; empty where it cannot run the format there."""
    is_awq: bool = False
    """Whether the source is the example as AWQ stores it, in groups of `AWQ_GROUP`; its values count as whole."""

    @property
    def rounds_activations(self) -> bool:
        """Whether vLLM computes with activations of 8 bits; test kernels leave them as they are."""
        return self.kernels == NATIVE and self.recipe["scheme"] in {"FP8_DYNAMIC", "W8A8"}

    @property
    def is_emulated(self) -> bool:
        """Whether activations have 4 bits, which no comparison with weights alone could stand."""
        return self.kernels == EMULATION


NVFP4_LIMIT: Final = 23.19 / 19.14
FP8_LIMIT: Final = 20.04 / 19.14


NVFP4_RATIO: Final = 50.14 / 36.19
"""Of calibrated scales, by the formulas in transformers (docs/activations.md); chosen after a first measurement."""
ASSUMED: Final = "constant:1000"


def _case(scheme: str, group_size: int | None = None, *, limit: float = 0.0, kernels: str = "") -> Case:
    name = f"{scheme} g{group_size}" if group_size else scheme
    recipe = {"scheme": scheme} | ({"group_size": group_size} if group_size else {})
    return Case(name=name, recipe=recipe, limit=limit, kernels=kernels)


CASES: Final = (
    _case("FP8_DYNAMIC", limit=FP8_LIMIT, kernels=NATIVE),
    _case("FP8_BLOCK"),
    _case("W8A8", limit=19.67 / 19.14, kernels=NATIVE),
    _case("MXFP8", limit=19.66 / 19.14, kernels=TEST_KERNELS),
    _case("MXFP8A16"),
    _case("NVFP4A16", limit=NVFP4_LIMIT, kernels=TEST_KERNELS),
    Case(
        name=f"NVFP4 {ASSUMED}",
        recipe={"scheme": "NVFP4", "input_scale": ASSUMED},
        limit=NVFP4_RATIO,
        kernels=EMULATION,
    ),
    _case("MXFP4"),
    _case("MXFP4A16", limit=27.28 / 19.14, kernels=TEST_KERNELS),
    _case("W8A16", 64),
    _case("W4A16", 64, limit=29.12 / 19.14, kernels=NATIVE),
    _case("W4A16", 32, limit=26.29 / 19.14, kernels=NATIVE),
    _case("W4A16_ASYM", 32, limit=23.84 / 19.14, kernels=NATIVE),
    _case("W4A8", 64),
    _case("W4AFP8", 64),
)
"""Every format of dense models."""
AWQ_GROUP: Final = 64
FROM_AWQ: Final = (
    Case(name="AWQ to FP8_DYNAMIC", recipe={"scheme": "FP8_DYNAMIC"}, limit=FP8_LIMIT, kernels=NATIVE, is_awq=True),
    Case(
        name="AWQ to W4A16_ASYM g64",
        recipe={"scheme": "W4A16_ASYM", "group_size": AWQ_GROUP},
        limit=1.0,
        kernels=NATIVE,
        is_awq=True,
    ),
)
"""Sources that are quantized already: one decoded and quantized, one whose codes are kept."""
IN_VLLM: Final = (*(case for case in CASES if case.kernels), *FROM_AWQ)
UNSHARED: Final = Case(
    name="NVFP4A16, global scales not shared",
    recipe={
        "scheme": "NVFP4A16",
        "architecture": {"fused_off": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]},
    },
    limit=NVFP4_LIMIT,
    kernels=TEST_KERNELS,
)
"""The negative control: wrong for an engine that merges q, k, v and gate, up, and right in every single tensor."""
EXPERTS: Final = ("qwen3_moe", "gpt_oss", "llama4", "granitemoe", "deepseek_v3")
"""Architectures of tests/zoo: matrices, alternating columns, halves of a transpose, stacked rows, matrices."""
SHARPEST: Final = "W8A8"
"""The format whose own error is the smallest, so that a misplaced matrix is seen best."""
LARGEST_LOSS: Final[Mapping[str, float]] = {
    "FP8_BLOCK": 0.3,
    SHARPEST: 0.05,
    "MXFP8": 0.3,
    "MXFP4A16": 0.6,
    "W8A16": 0.2,
    "W4A16_ASYM": 0.6,
}
"""Difference of logits from those of the source, relative; tiny random models route a token elsewhere now and then."""
