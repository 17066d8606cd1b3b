"""A recipe with several schemes: which scheme each loader gives every module, beside the intended one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file

from shardmill.core.recipe import parse_recipe
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.stages.verify import verify
from zoo.battery import Zoo, library_schemes, quantized, shapes_of

ATTENTION: Final = r"re:.*\.(self_attn|attention|linear_attn)\..*"
EXPERTS: Final = r"re:.*\.experts\..*"
RECIPE: Final[Mapping[str, Any]] = {
    "groups": [
        {"scheme": "FP8_DYNAMIC", "targets": [ATTENTION]},
        {"scheme": "NVFP4A16", "targets": [EXPERTS]},
        {"scheme": "W4A16", "group_size": 32, "targets": [r"re:.*shared_expert.*_proj"]},
    ],
}
"""FP8 attention, NVFP4 experts, INT4 shared experts where there are any; everything else stays as it is."""
MODELS: Final = (
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "glm4_moe",
    "qwen3_vl_moe",
    "granitemoe",
    "gpt_oss",
)


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """Modules that differ in numbers only."""

    model: str
    modules: str
    intended: str
    compressed_tensors: str
    transformers: str


def _label(scheme: Any) -> str:
    if scheme is None:
        return "dense"
    args = scheme.weights
    return {("float", 8): "FP8", ("float", 4): "NVFP4", ("int", 4): "INT4"}[str(args.type), args.num_bits]


def intended(name: str, module: str, source: Mapping[str, Any]) -> str:
    """What the recipe asks for, read off the module's name alone."""
    if re.search(r"\.(gate|router)$|router\.layer$|lm_head|embed_tokens|visual|shared_expert_gate|norm", module):
        return "dense"
    if ".experts." in module:
        return "NVFP4"
    if re.search(r"\.self_attn\.", module):
        return "FP8"
    if re.search(r"shared_expert", module):
        return "INT4"
    assert f"{module}.weight" in source, (name, module)
    return "dense"


def check_mixed(zoo: Zoo, name: str) -> list[Row]:
    """Convert with the mixed recipe; every module has the intended scheme for both loaders, or this raises."""
    from transformers.integrations.compressed_tensors import get_experts_scheme

    source, model = zoo.source(name)
    result = zoo.home / name / "mixed"
    recipe = dict(RECIPE)
    before = load_file(source / "model.safetensors")
    if not any("shared_expert" in key for key in before):
        recipe["groups"] = RECIPE["groups"][:2]
    locations = Locations(source=str(source), destination=str(result), store=str(zoo.home / "store"))
    run(locations, parse_recipe(recipe), RunOptions(device="cpu", workers=1))
    assert verify(str(result)) == []
    after = load_file(result / "model.safetensors")
    config = json.loads((result / "config.json").read_text())["quantization_config"]
    modules = quantized(after)
    by_library = library_schemes(config, shapes_of(after, modules))
    read = QuantizationConfig.model_validate(dict(config))
    apply_quantization_config(model, read, show_progress=False)
    live = {key: getattr(found, "quantization_scheme", None) for key, found in model.named_modules()}
    experts = _label(get_experts_scheme(read))
    rows = set()
    for module, scheme in by_library.items():
        wanted = intended(name, module, before)
        in_memory = experts if ".experts." in module else _label(live.get(module))
        assert _label(scheme) == wanted, (name, module)
        assert in_memory == wanted, (name, module)
        rows.add(Row(name, re.sub(r"\.\d+\.", ".N.", module), wanted, _label(scheme), in_memory))
    return sorted(rows)
