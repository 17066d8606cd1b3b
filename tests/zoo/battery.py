"""One cell of the zoo: an architecture converted with a scheme, and everything that is checked of the result.

What is true is told by others: names and layouts by transformers, values by an own reader of the formats and by
compressed-tensors, logits by transformers. Nothing here asks shardmill what it has done but `verify`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import as_bytes
from kernels.oracle import expected
from kernels.plain_decoding import decode
from shardmill.core.recipe import parse_recipe
from shardmill.core.scheme import parse_scheme, with_group_size
from shardmill.errors import Refused
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.stages.verify import verify
from zoo.further import FURTHER
from zoo.models import MODELS, Model, build, consolidated_name

ZOO: Final[Mapping[str, Model]] = {**MODELS, **FURTHER}
SCHEMES: Final[Mapping[str, dict[str, Any]]] = {
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
    "NVFP4A16": {"scheme": "NVFP4A16"},
    "W4A16": {"scheme": "W4A16", "group_size": 32},
}
FURTHER_SCHEMES: Final[Mapping[str, dict[str, Any]]] = {
    "FP8_BLOCK": {"scheme": "FP8_BLOCK"},
    "W8A8": {"scheme": "W8A8"},
    "MXFP8": {"scheme": "MXFP8"},
    "MXFP4A16": {"scheme": "MXFP4A16"},
    "W8A16": {"scheme": "W8A16", "group_size": 32},
    "W4A16_ASYM": {"scheme": "W4A16_ASYM", "group_size": 32},
}
"""The other formats; transformers refuses experts in most of them."""
_RECIPES: Final = {**SCHEMES, **FURTHER_SCHEMES}
LARGEST_DIFFERENCE: Final = 1e-2
"""Of logits of the same weights, read by two readers."""
REFUSED: Final = {"gpt2": "weight-transposed"}
"""Architectures that are refused, and the kind of the problem that says why."""
LAYOUTS: Final = {
    "gpt_oss": "interleaved",
    "llama4": "columns",
    "llama4_vision": "columns",
    "qwen3_vl_moe_hub": "columns",
}
"""How the stacks of a checkpoint are stored, where not as stacked rows."""
_STACK: Final = re.compile(r"(gate_up_proj|down_proj|input_linear\.weight|output_linear\.weight)(_bias)?$")
_SPLIT: Final = {"gate_up_proj": ("gate_proj", "up_proj"), "input_linear": ("w1", "w3"), "output_linear": ("w2",)}
_PARTNER: Final = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}
_TRANSFORMERS_CANNOT: Final = frozenset({"mistral_consolidated", "deepseek_v4"})
"""The one has names of its own; the code of the other computes in no dtype but float32."""
_ASKS_FOR_WEIGHT: Final = frozenset({"mamba2", "modernbert", "falcon", "t5"})
"""Architectures whose code in transformers reads `weight` of layers that hold `weight_packed` instead."""
_EXPERTS_IN_TRANSFORMERS: Final = frozenset({"FP8_DYNAMIC", "W4A16"})
"""Formats in which it loads experts, and loads them rightly."""
_SETS: Final = (
    {"q_proj", "k_proj", "v_proj"},
    {"wq", "wk", "wv"},
    {"query", "key", "value"},
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
    {"in_proj_qkv", "in_proj_z"},
)
"""Leaves below one parent that vLLM merges, read from its models' `packed_modules_mapping` and loaders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one conversion gave; a row of the table."""

    model: str
    scheme: str
    outcome: str
    """`ok`, or why there is nothing to compare."""
    quantized: int = 0
    dense: int = 0
    """Matrices that stay as they are."""
    sets: int = 0
    """Fused sets whose global scales were compared."""
    oracle: str = ""
    difference: float = 0.0
    """Relative difference of logits between our reader and the oracle."""
    loss: float = 0.0
    """Relative difference of logits from those of the source."""


class Zoo:
    """Sources that are built once."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._models: dict[str, Any] = {}

    def source(self, name: str) -> tuple[Path, Any]:
        """The folder of a source, and the model that it was written from."""
        folder = self.home / name / "source"
        if name not in self._models:
            self._models[name] = build(ZOO[name], folder)
        return folder, self._models[name]


def check_cell(zoo: Zoo, name: str, scheme: str) -> Cell:
    """Convert and check everything; what is wrong raises."""
    source, model = zoo.source(name)
    result = zoo.home / name / scheme
    locations = Locations(source=str(source), destination=str(result), store=str(zoo.home / "store"))
    try:
        run(locations, parse_recipe(_RECIPES[scheme]), RunOptions(device="cpu", workers=1))
    except Refused as error:
        if {problem.kind for problem in error.problems} != {REFUSED.get(name)}:
            raise
        return Cell(model=name, scheme=scheme, outcome=f"refused: {error.problems[0].message}")
    assert name not in REFUSED, "it was not refused"
    assert verify(str(result)) == []
    before, after = load_file(source / "model.safetensors"), load_file(result / "model.safetensors")
    modules = quantized(after)
    assert modules, "nothing is quantized"
    config = json.loads((result / "config.json").read_text())["quantization_config"]
    check_names(ZOO[name], model, modules)
    check_heads(name, model, config)
    check_copies(before, after, modules)
    check_experts(name, scheme, before, after)
    check_resolution(config, after, modules)
    check_params_json(result, config)
    sets = check_global_scales(modules) if scheme == "NVFP4A16" else 0
    oracle, difference, loss = check_logits(zoo, name, scheme, after, modules, config)
    dense = sum(
        key.endswith(".weight") and tensor.dim() == 2 and key.removesuffix(".weight") not in modules
        for key, tensor in after.items()
    )
    return Cell(
        model=name,
        scheme=scheme,
        outcome="ok",
        quantized=len(modules),
        dense=dense,
        sets=sets,
        oracle=oracle,
        difference=difference,
        loss=loss,
    )


def quantized(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Params of every module that has a scale."""
    names = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    found: dict[str, dict[str, Tensor]] = {name: {} for name in sorted(names)}
    for name, tensor in tensors.items():
        module, _, param = name.rpartition(".")
        if module in found:
            found[module][param] = tensor
    return found


_RENAMED_ON_LOAD: Final = (
    r"\.experts\.\d+\.|^layers\.\d+\.(attention|feed_forward)|^backbone\.layers|shared_experts?\.|block_sparse_moe\."
    r"|self_attn\.[fgb]_([ab]_)?proj|\.attn\.(compressor\.)?w|^language_model\.model\.model\.|\.self_attn\.(to_|w)"
)
"""What transformers calls otherwise in memory: experts, Mistral's own names, Mamba's, KDA's projections."""


_NEVER: Final = {"gate", "router", "conv1d", "embed_tokens", "tok_embeddings", "wte", "norm", "lm_head", "output"}


def _live_names(module: str) -> Iterator[str]:
    """Names that a module of a checkpoint may have in memory."""
    yield module
    for there, here in (
        ("model.", ""), ("", "model."), ("model.", "model.language_model."),
        ("language_model.model.", "model.language_model."), ("backbone.", "model."),
    ):  # fmt: skip
        if module.startswith(there):
            yield here + module.removeprefix(there)


# ---- names ------------------------------------------------------------------------------------------------------


def check_names(spec: Model, model: Any, modules: Mapping[str, Any]) -> None:
    """Only linear layers are quantized, and none of a tower, a router or a head, as the live model has them."""
    live = dict(model.named_modules())
    head = model.get_output_embeddings()
    for module in modules:
        assert not set(spec.towers).intersection(module.split(".")), module
        found = next((live[name] for name in _live_names(module) if name in live), None)
        if found is None:
            assert re.search(_RENAMED_ON_LOAD, module), module
            continue
        assert isinstance(found, torch.nn.Linear), f"{module} is a {type(found).__name__}"
        assert found is not head, module
        parent = live.get(module.rpartition(".")[0], found)
        assert not re.search("router|topk", type(found).__name__ + type(parent).__name__, re.IGNORECASE), module
    leaves = {module.rpartition(".")[2] for module in modules}
    assert not leaves & {
        "gate",
        "router",
        "conv1d",
        "embed_tokens",
        "tok_embeddings",
        "wte",
        "norm",
        "lm_head",
        "output",
    }


def check_heads(name: str, model: Any, config: Mapping[str, Any]) -> None:
    """The head is in `ignore` under the name that the live model has for it, whether a tensor is there or not."""
    head = model.get_output_embeddings()
    names = [module for module, found in model.named_modules() if found is head]
    assert names, "the model has no head"
    expected_name = consolidated_name(names[0]) if name == "mistral_consolidated" else names[0]
    assert expected_name in config["ignore"]
    assert "lm_head" in config["ignore"]


def check_copies(before: Mapping[str, Tensor], after: Mapping[str, Tensor], modules: Mapping[str, Any]) -> None:
    """Every tensor that is not quantized or split keeps its bytes; vectors and convolutions are among them."""
    for name, tensor in before.items():
        if name in after and name.removesuffix(".weight") not in modules:
            assert as_bytes({name: after[name]}) == as_bytes({name: tensor}), name
        elif name not in after:
            assert tensor.dim() == 2 or _STACK.search(name), name
        if tensor.dim() == 1 or (tensor.dim() > 2 and not _STACK.search(name)):
            assert name in after, name


# ---- experts ----------------------------------------------------------------------------------------------------


def true_slices(name: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every projection of every expert of a checkpoint's stacks, `[out, in]`, and its bias, as the model uses them."""
    layout = LAYOUTS.get(name, "rows")
    for stack, tensor in tensors.items():
        if (found := _STACK.search(stack)) is None or tensor.dim() != (2 if found[2] else 3):
            continue
        parent, kind = stack[: found.start()], "bias" if found[2] else "weight"
        leaf = found[1].removesuffix(".weight")
        prefix = parent if parent.endswith("experts.") else f"{parent}experts."
        halves = _SPLIT.get(leaf, ("down_proj",))
        for expert in range(tensor.shape[0]):
            matrix = tensor[expert] if layout == "rows" or kind == "bias" else tensor[expert].T
            parts = [matrix[0::2], matrix[1::2]] if layout == "interleaved" else list(matrix.chunk(2))
            for half, part in zip(halves, parts if len(halves) > 1 else [matrix], strict=True):
                yield f"{prefix}{expert}.{half}.{kind}", part.contiguous()


def restacked(name: str, tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense tensors of a result in the layout of its source."""
    slices = defaultdict(list)
    for part, _ in true_slices(name, before):
        slices[re.sub(r"experts\.\d+\.", "experts.#.", part)].append(tensors[part])
    found = {key: tensor for key, tensor in tensors.items() if key in before}
    for stack, tensor in before.items():
        if stack in found:
            continue
        first = [part for part, _ in true_slices(name, {stack: tensor}) if "experts.0." in part]
        rows = [torch.stack(slices[part.replace("experts.0.", "experts.#.")]) for part in first]
        found[stack] = _join(rows, LAYOUTS.get(name, "rows"), is_bias=first[0].endswith("bias")).to(tensor.dtype)
    return found


def _join(rows: list[Tensor], layout: str, *, is_bias: bool) -> Tensor:
    if len(rows) == 1:
        joined = rows[0]
    elif layout == "interleaved":
        joined = torch.stack(rows, 2).flatten(1, 2)
    else:
        joined = torch.cat(rows, 1)
    return joined if layout == "rows" or is_bias else joined.transpose(1, 2).contiguous()


def check_experts(name: str, scheme: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Codes and scales of every expert are those that compressed-tensors gives for its true slice."""
    args = parse_scheme(scheme)
    if size := _RECIPES[scheme].get("group_size"):
        args = with_group_size(args, size)
    slices = dict(true_slices(name, before))
    for key, part in slices.items():
        module, _, kind = key.rpartition(".")
        if kind == "bias":
            assert torch.equal(after[key], part), key
            continue
        partner = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}.get(
            module.rpartition(".")[2]
        )
        amax = part.float().abs().max()
        if partner:
            amax = torch.maximum(amax, slices[f"{module.rpartition('.')[0]}.{partner}.weight"].float().abs().max())
        for param, tensor in expected(args, part, float(amax)).items():
            found = after[f"{module}.{param}"]
            assert as_bytes({"": found}) == as_bytes({"": tensor.reshape(found.shape)}), f"{module}.{param}"


def check_global_scales(modules: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Members of every fused set have one global scale, by the bytes that were written."""
    below: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        below[module.rpartition(".")[0]].add(module.rpartition(".")[2])
    count = 0
    for parent, leaves in below.items():
        for members in _SETS:
            present = sorted(leaves & members)
            scales = {modules[f"{parent}.{leaf}"]["weight_global_scale"].item() for leaf in present}
            assert len(scales) <= 1, (parent, present)
            count += len(present) > 1
    return count


# ---- configs ----------------------------------------------------------------------------------------------------


def skeleton(modules: Mapping[str, tuple[int, int]]) -> torch.nn.Module:
    """A model of nothing but linear layers of these names, without memory."""
    root = torch.nn.Module()
    for name, (rows, cols) in modules.items():
        *parents, leaf = name.split(".")
        at = root
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        if isinstance(getattr(at, leaf, None), torch.nn.Module):
            continue
        at.add_module(leaf, torch.nn.Linear(cols, rows, bias=False, device="meta"))
    return root


def library_schemes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What compressed-tensors itself gives each module: its scheme, or None."""
    model = skeleton(shapes)
    read = QuantizationConfig.model_validate(dict(config))
    apply_quantization_config(model, read, show_progress=False)
    return {name: getattr(model.get_submodule(name), "quantization_scheme", None) for name in shapes}


def shapes_of(after: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[int, int]]:
    """Rows and columns of every matrix of a result."""
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in after.items():
        module, _, param = name.rpartition(".")
        if param == "weight" and tensor.dim() == 2 and module not in modules:
            found[module] = (tensor.shape[0], tensor.shape[1])
    return found | {module: _shape(params) for module, params in modules.items()}


def _shape(params: Mapping[str, Tensor]) -> tuple[int, int]:
    if "weight_shape" in params:
        rows, cols = params["weight_shape"].tolist()
        return int(rows), int(cols)
    if "weight_packed" in params:
        return params["weight_packed"].shape[0], 2 * params["weight_packed"].shape[1]
    return params["weight"].shape[0], params["weight"].shape[1]


def check_resolution(config: dict[str, Any], after: Mapping[str, Tensor], modules: Mapping[str, Any]) -> None:
    """compressed-tensors gives a scheme to the quantized modules and to no other."""
    found = library_schemes(config, shapes_of(after, modules))
    assert {name for name, scheme in found.items() if scheme is not None} == set(modules)


def check_params_json(result: Path, config: Mapping[str, Any]) -> None:
    """Where Mistral's params.json is, it says the same as config.json."""
    if (result / "params.json").exists():
        assert json.loads((result / "params.json").read_text())["quantization"] == config


# ---- logits -----------------------------------------------------------------------------------------------------


def own_weights(
    after: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """All tensors of a result with dense weights, by the formulas of the formats, rounded to BF16."""
    bits, block = _told_by(config)
    found = {name: tensor for name, tensor in after.items() if name.rpartition(".")[0] not in modules}
    for module, params in modules.items():
        stored = {
            param: (_DTYPES[str(tensor.dtype)], tuple(tensor.shape), _octets(tensor))
            for param, tensor in params.items()
        }
        values = decode(stored, _shape(params), bits, block)
        found[f"{module}.weight"] = torch.from_numpy(values.astype("float32").copy()).to(torch.bfloat16)
        if "bias" in params:
            found[f"{module}.bias"] = params["bias"]
    return found


def _told_by(config: Mapping[str, Any]) -> tuple[int, tuple[int, int] | None]:
    """What tensors do not tell: bits of packed integers, and the shape of blocks."""
    told = {
        (args["num_bits"], tuple(args.get("block_structure") or ()) or None)
        for args in (group["weights"] for group in config["config_groups"].values())
    }
    assert len(told) == 1, "one format is read at a time"
    return told.pop()


_DTYPES: Final = {
    "torch.bfloat16": "BF16", "torch.float32": "F32", "torch.uint8": "U8", "torch.int8": "I8", "torch.int32": "I32",
    "torch.int64": "I64", "torch.float8_e4m3fn": "F8_E4M3",
}  # fmt: skip


def _octets(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def library_weights(
    after: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The same by compressed-tensors' own decompression."""
    found = {name: tensor for name, tensor in after.items() if name.rpartition(".")[0] not in modules}
    schemes = library_schemes(config, shapes_of(after, modules))
    for module, params in modules.items():
        scheme = schemes[module]
        codes = {param: tensor for param, tensor in params.items() if param.startswith("weight")}
        decompressed = BaseCompressor.get_value_from_registry(scheme.format).decompress(codes, scheme)
        found[f"{module}.weight"] = decompressed["weight"].to(torch.bfloat16)
        if "bias" in params:
            found[f"{module}.bias"] = params["bias"]
    return found


def check_logits(
    zoo: Zoo,
    name: str,
    scheme: str,
    after: Mapping[str, Tensor],
    modules: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
) -> tuple[str, float, float]:
    """Logits of the weights as we read them are those of the weights as others do."""
    source, _ = zoo.source(name)
    before = load_file(source / "model.safetensors")
    own = dense_logits(zoo, name, own_weights(after, modules, config))
    if is_read_by_transformers(name, scheme, before, modules):
        oracle = "transformers"
        found = logits(_without_activations(zoo.home / name / scheme), name)
    else:
        oracle = "compressed-tensors"
        decoded = library_weights(after, modules, config)
        found = dense_logits(zoo, name, decoded)
    whole = dense_logits(zoo, name, before)
    difference, loss = relative(own, found), relative(own, whole)
    assert difference <= LARGEST_DIFFERENCE, f"{difference} from {oracle}"
    assert 0 < loss < 1.5, f"logits differ by {loss} from those of the source"
    return oracle, difference, loss


def dense_logits(zoo: Zoo, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Logits of the source's model with the dense weights of a result, or with its own."""
    source, _ = zoo.source(name)
    before = load_file(source / "model.safetensors")
    whole = tensors if tensors.keys() == before.keys() else restacked(name, tensors, before)
    return logits(_folder(zoo, source, name, whole), name)


def is_read_by_transformers(name: str, scheme: str, before: Mapping[str, Tensor], modules: Mapping[str, Any]) -> bool:
    """Whether transformers loads the result itself, and rightly.

    It does not put split experts together again, drops the global scale of experts in NVFP4
    (huggingface/transformers#48371) and refuses them in some formats; names of Mistral's own it does not know.
    """
    if name in _TRANSFORMERS_CANNOT or any(True for _ in true_slices(name, before)):
        return False
    if name in _ASKS_FOR_WEIGHT and scheme != "FP8_DYNAMIC":
        return False
    return scheme in _EXPERTS_IN_TRANSFORMERS or not any(".experts." in module for module in modules)


def relative(found: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm."""
    return float((found - reference).norm() / reference.norm())


def _folder(zoo: Zoo, source: Path, name: str, tensors: Mapping[str, Tensor]) -> Path:
    """A dense checkpoint of these tensors, with the source's config."""
    folder = zoo.home / "dense"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if name == "mistral_consolidated":
        tensors = {_hub_name(key): tensor for key, tensor in tensors.items()}
    save_file(
        {key: t.contiguous() for key, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    shutil.copy(source / "config.json", folder)
    return folder


def _hub_name(name: str) -> str:
    """The inverse of `consolidated_name`."""
    for there, here in (
        ("self_attn", "attention"), ("mlp", "feed_forward"), ("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"),
        ("o_proj", "wo"), ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"),
        ("post_attention_layernorm", "ffn_norm"), ("input_layernorm", "attention_norm"),
        ("model.embed_tokens", "tok_embeddings"), ("lm_head", "output"),
    ):  # fmt: skip
        name = re.sub(rf"(^|\.){here}(\.|$)", rf"\g<1>{there}\g<2>", name)
    return name if name.startswith(("model.", "lm_head")) else f"model.{name}"


def _without_activations(result: Path) -> Path:
    """The result as it is, but that activations are not quantized: the weights alone are compared."""
    folder = result.with_name(f"{result.name}-weights")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in result.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    document = json.loads((result / "config.json").read_text())
    for group in document["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def logits(folder: Path, name: str) -> Tensor:
    """Logits of a checkpoint in transformers, in float32."""
    import transformers

    spec = ZOO[name]
    cls = getattr(transformers, spec.model)
    model, info = cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"], sorted(info["missing_keys"])[:5]
    inputs = _inputs(spec, model)
    with torch.no_grad():
        if hasattr(model.config, "quantization_config"):
            model(**inputs)  # compressed weights are given back when they are first needed
        torch.nn.Module.float(model)
        inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
        found: Tensor = model(**inputs).logits
    assert found.isfinite().all()
    return found


def _inputs(spec: Model, model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, 120, (2, 12), generator=generator)
    if spec.inputs == "speech":
        features = torch.randn(2, 80, 64, generator=generator).to(model.dtype)
        return {"input_features": features, "decoder_input_ids": tokens}
    if spec.inputs == "pair":
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
    return {"input_ids": tokens} | ({"attention_mask": torch.ones_like(tokens)} if spec.inputs == "masked" else {})
