"""How one set of modules is quantized: weight arguments, schemes, and the table of presets.

A small description of compressed-tensors' `QuantizationArgs` and `QuantizationScheme`, kept here because importing that
library costs seconds. `kernels.ct_adapter` converts both ways and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from shardmill.core.dtypes import E2M1_MAX, E4M3_MAX
from shardmill.core.input_scale import InputScale, parse_input_scale
from shardmill.errors import Problem, RecipeInvalid, show

LOCAL: Final = "local"
"""`dynamic` of activations whose local scales alone are dynamic."""
STRATEGIES: Final = ("tensor", "channel", "group", "block", "tensor_group")
MINMAX_OBSERVERS: Final = frozenset({"minmax", "static_minmax", "memoryless_minmax"})
SEARCHES: Final = ("none", "mse")
"""How scales are chosen: from the extremes alone, or by the error that they leave."""
NORMS: Final = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)


def _invalid(message: str, way_out: str = "") -> RecipeInvalid:
    return RecipeInvalid([Problem(kind="scheme", message=message, way_out=way_out)])


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightArgs:
    """Arguments of weight quantization, named as in compressed-tensors.

    >>> WeightArgs(num_bits=4, strategy="group", group_size=128).code_max
    7.5
    """

    num_bits: int = 8
    type: str = "int"
    strategy: str = "channel"
    symmetric: bool = True
    group_size: int | None = None
    """Consecutive input features that share a scale; for `group` and `tensor_group`."""
    block_structure: tuple[int, int] | None = None
    """`(rows, cols)` that share a scale; for `block`."""
    scale_dtype: str | None = None
    """`float8_e4m3fn` (NVFP4), `uint8` (MX exponent), or None: the dtype follows the source."""

    def __post_init__(self) -> None:
        for message in _weight_defects(self):
            raise _invalid(message)

    @property
    def is_mx(self) -> bool:
        """Whether scales are powers of two stored as their exponent byte."""
        return self.scale_dtype == "uint8"

    @property
    def has_global_scale(self) -> bool:
        """Whether a second, per-tensor scale exists; such a scheme shares it within a fused set."""
        return self.strategy == "tensor_group"

    @property
    def needs_extent(self) -> bool:
        """Whether the first code takes the extent of a whole weight or fused set, so that values are read twice."""
        return self.strategy in ("tensor", "tensor_group")

    @property
    def code_range(self) -> tuple[float, float]:
        """Smallest and largest code."""
        if self.type == "float":
            top = E4M3_MAX if self.num_bits == 8 else E2M1_MAX
            return -top, top
        return -float(2 ** (self.num_bits - 1)), float(2 ** (self.num_bits - 1) - 1)

    @property
    def code_max(self) -> float:
        """Half the code range: a symmetric scale is `amax / code_max`."""
        low, high = self.code_range
        return (high - low) / 2


def _weight_defects(args: WeightArgs) -> list[str]:
    found: list[str] = []
    grouped = args.strategy in ("group", "tensor_group")
    if args.strategy not in STRATEGIES:
        found.append(f"strategy {show(str(args.strategy))} of weights is not one of {', '.join(STRATEGIES)}")
    if args.type == "int" and not 2 <= args.num_bits <= 8:
        found.append(f"int weights take 2 to 8 bits, found {args.num_bits}")
    if args.type not in ("int", "float"):
        found.append(f"type of weights must be `int` or `float`, found {show(str(args.type))}")
    if args.type == "float" and args.num_bits not in (4, 8):
        found.append(f"float weights take 4 or 8 bits, found {args.num_bits}")
    if args.type == "float" and not args.symmetric:
        found.append("float weights are symmetric; asymmetric ones have no format")
    if grouped and (args.group_size is None or args.group_size < 1):
        found.append(f"strategy {show(args.strategy)} needs a positive group_size, found {args.group_size}")
    if not grouped and args.group_size not in (None, -1):
        found.append(f"group_size {args.group_size} needs strategy `group`, found {show(str(args.strategy))}")
    if (args.strategy == "block") != (args.block_structure is not None):
        found.append("block_structure goes with strategy `block`, and only with it")
    if args.block_structure is not None and (len(args.block_structure) != 2 or min(args.block_structure) < 1):
        found.append(f"block_structure must be two positive integers, found {list(args.block_structure)}")
    found += _scale_defects(args)
    return found


def _scale_defects(args: WeightArgs) -> list[str]:
    nvfp4 = args.strategy == "tensor_group" and args.scale_dtype == "float8_e4m3fn" and args.group_size == 16
    mx = args.strategy == "group" and args.scale_dtype == "uint8" and args.group_size == 32
    if args.type == "float" and args.num_bits == 4 and not (nvfp4 or mx):
        return ["4-bit float weights are NVFP4 (tensor_group 16, scale_dtype float8_e4m3fn) or MXFP4 (group 32, uint8)"]
    if args.strategy == "tensor_group" and not (nvfp4 and args.type == "float" and args.num_bits == 4):
        return ["strategy `tensor_group` is NVFP4: 4-bit float, group_size 16, scale_dtype float8_e4m3fn"]
    if args.scale_dtype == "uint8" and not (mx and args.type == "float"):
        return ["scale_dtype `uint8` is MX: float weights, strategy `group`, group_size 32"]
    if args.scale_dtype not in (None, "uint8", "float8_e4m3fn"):
        return [f"scale_dtype of weights must be absent, uint8 or float8_e4m3fn, found {show(str(args.scale_dtype))}"]
    if args.scale_dtype == "float8_e4m3fn" and not nvfp4:
        return ["scale_dtype `float8_e4m3fn` is NVFP4: strategy `tensor_group`, group_size 16"]
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationArgs:
    """Arguments of dynamic activation quantization; written to config.json, never computed here."""

    num_bits: int = 8
    type: str = "int"
    strategy: str = "token"
    symmetric: bool = True
    group_size: int | None = None
    scale_dtype: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether only local scales are dynamic, below a global one that is stored: `dynamic: local`, NVFP4."""
        return self.strategy == "tensor_group"

    def __post_init__(self) -> None:
        layout = (self.num_bits, self.type, self.symmetric, self.group_size, self.scale_dtype)
        if self.is_local and layout != (4, "float", True, 16, "float8_e4m3fn"):
            raise _invalid("activations with strategy `tensor_group` are NVFP4: 4-bit float, 16, float8_e4m3fn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Choose, among scales that can be stored, the one with the least error of what is read back.

    >>> Search(norm=2.5).to_json()
    {'kind': 'mse', 'norm': 2.5}
    """

    norm: float = 2.0
    """Errors count by this power: a multiple of 0.5, which takes no more than products and square roots."""
    importance: str = ""
    """Digest of a file that tells how much the error in each input feature counts; empty for all alike."""
    importance_file: str = field(default="", compare=False)
    """Where it lies: for those who read it, and in no key and no document."""

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise _invalid(f"norm of a search must be one of {', '.join(map(str, NORMS))}, found {self.norm!r}")

    def to_json(self) -> dict[str, Any]:
        """Describe it; the inverse of `parse_search`."""
        told = {"importance": self.importance} if self.importance else {}
        return {"kind": "mse", "norm": self.norm, **told}


def parse_search(value: Any) -> Search | None:
    """Read `none`, `mse`, or a mapping with `kind`, `norm` and `importance_file`; documents have its digest instead.

    Raises:
        RecipeInvalid: anything else.

    >>> parse_search("mse") == parse_search({"kind": "mse"}) == Search(), parse_search("none")
    (True, None)
    """
    options = {"kind": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping) or options.get("kind") not in SEARCHES:
        raise _invalid(f"search must be one of {', '.join(SEARCHES)}, found {show(str(value))}")
    unknown = sorted(str(key) for key in set(options) - {"kind", "norm", "importance", "importance_file"})
    if unknown:
        known = "known: kind, norm, importance_file"
        raise _invalid(f"search has unknown fields: {', '.join(map(show, unknown))}", known)
    if options["kind"] == "none":
        return None
    norm = options.get("norm", 2.0)
    if isinstance(norm, bool) or not isinstance(norm, int | float):
        raise _invalid(f"norm of a search must be a number, found {show(str(norm))}")
    digest, file = options.get("importance", ""), options.get("importance_file", "")
    if not isinstance(digest, str) or not isinstance(file, str):
        raise _invalid(f"importance of a search must be text, found {show(str(digest or file))}")
    return Search(norm=float(norm), importance=digest, importance_file=file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one set of modules is quantized.

    >>> preset("FP8_DYNAMIC").format
    'float-quantized'
    """

    weights: WeightArgs
    input_activations: ActivationArgs | None = None
    preset: str | None = None
    """Name under which the user knows it, when it is an unchanged preset."""
    search: Search | None = None
    """How scales are chosen; None: from the extremes alone."""
    input_scale: InputScale | None = None
    """Where the global scale of activations comes from; a recipe must say so where `needs_input_scale`."""

    @property
    def needs_input_scale(self) -> bool:
        """Whether a global scale of activations is stored with every weight, which weights do not tell."""
        return self.input_activations is not None and self.input_activations.is_local

    def __post_init__(self) -> None:
        if self.needs_input_scale and not self.weights.has_global_scale:
            raise _invalid("activations with strategy `tensor_group` go with NVFP4 weights", "take the preset NVFP4")
        if self.input_scale is not None and not self.needs_input_scale:
            raise _invalid(f"input_scale does not go with scheme {show(self.label)}", "it goes with NVFP4")
        if self.search is not None and self.weights.strategy == "tensor":
            raise _invalid(
                "search `mse` does not fit strategy `tensor`: one scale for a whole weight is chosen before it is read",
                "use strategy channel, group or block, or leave search out",
            )

    @property
    def format(self) -> str:
        """On-disk layout, chosen as compressed-tensors chooses it for a Linear, with one exception.

        Integer weights with float activations are packed, since engines load them only so.
        """
        args = self.weights
        if args.type == "float" and args.num_bits == 4:
            return "nvfp4-pack-quantized" if args.has_global_scale else "mxfp4-pack-quantized"
        if args.is_mx:
            return "mxfp8-quantized"
        if args.type == "float":
            return "float-quantized" if self.input_activations is not None else "naive-quantized"
        unpacked = self.input_activations is not None and self.input_activations.type == "int"
        return "int-quantized" if unpacked else "pack-quantized"

    @property
    def label(self) -> str:
        """Short name for people: the preset, or the arguments in a few words, and the search if there is one."""
        return self._name if self.search is None else f"{self._name} mse"

    @property
    def _name(self) -> str:
        args = self.weights
        if self.preset:
            return self.preset
        size = f" {args.group_size}" if args.strategy in ("group", "tensor_group") else ""
        if args.block_structure:
            size = " {}x{}".format(*args.block_structure)
        kind = "" if args.symmetric else " asymmetric"
        return f"{args.type}{args.num_bits} {args.strategy}{size}{kind}"


def _int_group(bits: int, activations: ActivationArgs | None = None, *, symmetric: bool = True) -> Scheme:
    args = WeightArgs(num_bits=bits, strategy="group", group_size=128, symmetric=symmetric)
    return Scheme(weights=args, input_activations=activations)


_TOKEN_INT8 = ActivationArgs(num_bits=8)
_TOKEN_INT4 = ActivationArgs(num_bits=4)
_TOKEN_FP8 = ActivationArgs(type="float")
_FP8_CHANNEL = WeightArgs(type="float")
_FP8_BLOCKS = WeightArgs(type="float", strategy="block", block_structure=(128, 128))
_FP8_GROUPS = ActivationArgs(type="float", strategy="group", group_size=128)
_NVFP4 = WeightArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype="float8_e4m3fn")
_NVFP4_ACTIVATIONS = ActivationArgs(
    num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype="float8_e4m3fn"
)
_MXFP4 = WeightArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="uint8")
_MXFP8 = replace(_MXFP4, num_bits=8)
_MX_ACTIVATIONS = ActivationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="uint8")

_PRESETS: dict[str, Scheme] = {
    "FP8_DYNAMIC": Scheme(weights=_FP8_CHANNEL, input_activations=_TOKEN_FP8),
    "FP8_BLOCK": Scheme(weights=_FP8_BLOCKS, input_activations=_FP8_GROUPS),
    "W8A8": Scheme(weights=WeightArgs(), input_activations=_TOKEN_INT8),
    "INT8": Scheme(weights=WeightArgs(), input_activations=_TOKEN_INT8),
    **{f"W{bits}A16": _int_group(bits) for bits in range(2, 9)},
    "W4A16_ASYM": _int_group(4, symmetric=False),
    **{f"W{bits}A8": _int_group(bits, _TOKEN_INT8) for bits in range(2, 8)},
    **{f"W{bits}A4": _int_group(bits, _TOKEN_INT4) for bits in range(2, 5)},
    "W4AFP8": _int_group(4, _TOKEN_FP8),
    "NVFP4A16": Scheme(weights=_NVFP4),
    "NVFP4": Scheme(weights=_NVFP4, input_activations=_NVFP4_ACTIVATIONS),
    "MXFP4": Scheme(weights=_MXFP4, input_activations=_MX_ACTIVATIONS),
    "MXFP4A16": Scheme(weights=_MXFP4),
    "MXFP8": Scheme(weights=_MXFP8, input_activations=replace(_MX_ACTIVATIONS, num_bits=8)),
    "MXFP8A16": Scheme(weights=_MXFP8),
}
PRESETS: Final[Mapping[str, Scheme]] = {name: replace(scheme, preset=name) for name, scheme in _PRESETS.items()}
"""Every preset of compressed-tensors that needs no calibration data, and NVFP4, which is told what data would tell."""

REFUSED_PRESETS: Final[Mapping[str, str]] = {
    "FP8": "its static activation scale needs calibration data; FP8_DYNAMIC needs none",
    "UNQUANTIZED": "it quantizes nothing; copy the checkpoint instead",
}


def preset(name: str) -> Scheme:
    """Look a preset up by name, whatever its case.

    Raises:
        RecipeInvalid: unknown, or it needs calibration data (the message says which to take instead).

    >>> preset("w4a16").weights.group_size
    128
    """
    key = name.upper()
    if key in REFUSED_PRESETS:
        raise _invalid(f"scheme {show(name)} cannot be used without data: {REFUSED_PRESETS[key]}")
    if key not in PRESETS:
        raise _invalid(f"unknown scheme {show(name)}", f"known: {', '.join(PRESETS)}")
    return PRESETS[key]


def with_group_size(scheme: Scheme, group_size: int) -> Scheme:
    """Return `scheme` with another group size for its weights.

    Raises:
        RecipeInvalid: the format fixes its group size, or has none.
    """
    if scheme.weights.strategy != "group":
        raise _invalid(
            f"group_size {group_size} does not fit scheme {show(scheme.label)}: strategy {scheme.weights.strategy}",
            "leave it out, or take a scheme with groups such as W4A16",
        )
    changed = replace(scheme.weights, group_size=group_size)
    return scheme if changed == scheme.weights else replace(scheme, weights=changed, preset=None)


_IGNORED_ARGS = frozenset({"observer_kwargs", "zp_dtype", "actorder", "dynamic", "observer"})


def _dtype_name(value: Any) -> str | None:
    """Name of a scale dtype without torch's prefix; the plain float dtypes say nothing beyond the default."""
    name = str(value).removeprefix("torch.") if value is not None else None
    return None if name in ("bfloat16", "float16", "float32") else name


def _known(data: Mapping[str, Any], fields: tuple[str, ...], subject: str) -> dict[str, Any]:
    unknown = sorted(
        str(key) for key, value in data.items() if value is not None and key not in {*fields, *_IGNORED_ARGS}
    )
    if unknown:
        raise _invalid(f"{subject} has unknown fields: {', '.join(map(show, unknown))}", f"known: {', '.join(fields)}")
    return {name: data[name] for name in fields if data.get(name) is not None}


def _normalise(data: Mapping[str, Any], fields: tuple[str, ...], subject: str) -> dict[str, Any]:
    """Known fields with checked types, enums and dtypes as plain words."""
    args = _known(data, fields, subject)
    for name in ("num_bits", "group_size"):
        if name in args and (isinstance(args[name], bool) or not isinstance(args[name], int)):
            raise _invalid(f"{name} of {subject} must be an integer, found {args[name]!r}")
    if not isinstance(args.get("symmetric", True), bool):
        raise _invalid(f"symmetric of {subject} must be true or false, found {args['symmetric']!r}")
    for name in ("type", "strategy"):
        if name in args:
            args[name] = str(getattr(args[name], "value", args[name])).lower()
    args["scale_dtype"] = _dtype_name(args.get("scale_dtype"))
    return args


def _refuse_calibration(data: Mapping[str, Any]) -> None:
    if data.get("dynamic"):
        raise _invalid("weights cannot be dynamic: they are quantized once", "leave `dynamic` out of weights")
    if data.get("actorder"):
        raise _invalid("actorder needs calibration data", "leave `actorder` out")
    if data.get("observer") not in (None, *MINMAX_OBSERVERS):
        known = ", ".join(sorted(MINMAX_OBSERVERS))
        raise _invalid(f"observer {show(str(data['observer']))} is not available; known: {known}", "leave it out")


def parse_weight_args(data: Mapping[str, Any]) -> WeightArgs:
    """Build `WeightArgs` from a mapping with compressed-tensors' field names; group_size may stand for the strategy.

    Raises:
        RecipeInvalid: unknown field, a value that needs data (`dynamic`, `actorder`, observers), or no known format.

    >>> parse_weight_args({"num_bits": 4, "group_size": 32}).strategy
    'group'
    """
    if not isinstance(data, Mapping):
        raise _invalid(f"weights must be a mapping of arguments, found {type(data).__name__}")
    _refuse_calibration(data)
    fields = ("num_bits", "type", "strategy", "symmetric", "group_size", "block_structure", "scale_dtype")
    args = _normalise(data, fields, "weights")
    size = args.get("group_size")
    if "strategy" not in args:
        structured = "block" if "block_structure" in args else "tensor"
        args["strategy"] = structured if size is None else "channel" if size == -1 else "group"
    if size == -1:
        del args["group_size"]
    if "block_structure" in args:
        args["block_structure"] = _block_structure(args["block_structure"])
    return WeightArgs(**args)


def _block_structure(value: Any) -> tuple[int, int]:
    parts = [int(p) if p.isdigit() else p for p in value.split("x")] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != 2 or not all(type(part) is int for part in parts):
        raise _invalid(f"block_structure must be [rows, cols], found {value!r}")
    return parts[0], parts[1]


def parse_activation_args(data: Mapping[str, Any] | None) -> ActivationArgs | None:
    """Build `ActivationArgs` from a mapping with compressed-tensors' field names; None stays None.

    Raises:
        RecipeInvalid: not dynamic, so it needs calibration data.
    """
    if data is None:
        return None
    if not isinstance(data, Mapping):
        raise _invalid(f"input_activations must be a mapping of arguments, found {type(data).__name__}")
    dynamic = getattr(data.get("dynamic"), "value", data.get("dynamic"))
    if dynamic not in (True, LOCAL) or type(dynamic) not in (bool, str):
        raise _invalid("static activations need calibration data", "set `dynamic: true` in input_activations")
    fields = ("num_bits", "type", "strategy", "symmetric", "group_size", "scale_dtype")
    args = _normalise(data, fields, "input_activations")
    if "strategy" not in args:
        args["strategy"] = "group" if args.get("group_size") else "tensor"
    if (dynamic == LOCAL) != (args["strategy"] == "tensor_group"):
        raise _invalid("`dynamic: local` goes with strategy `tensor_group` of activations, and only with it")
    return ActivationArgs(**args)


_SCHEME_FIELDS: Final = frozenset(
    {"weights", "input_activations", "output_activations", "format", "targets", "preset", "search", "input_scale"}
)


def parse_scheme(data: str | Mapping[str, Any]) -> Scheme:
    """Build a scheme from a preset name or a mapping with `weights` and `input_activations`.

    Raises:
        RecipeInvalid: as `preset`, `parse_weight_args` and `parse_activation_args`.
    """
    if isinstance(data, str):
        return preset(data)
    if not isinstance(data, Mapping):
        raise _invalid(f"a scheme is a preset name or a mapping, found {type(data).__name__}")
    unknown = sorted(set(data) - _SCHEME_FIELDS)
    if unknown:
        raise _invalid(f"scheme has unknown fields: {', '.join(map(show, unknown))}")
    if data.get("weights") is None:
        raise _invalid("a scheme needs `weights`: nothing else can be quantized without data")
    if data.get("output_activations") is not None:
        raise _invalid("output_activations need calibration data", "leave them out")
    name = str(data.get("preset"))
    scheme = Scheme(
        weights=parse_weight_args(data["weights"]),
        input_activations=parse_activation_args(data.get("input_activations")),
    )
    if name in PRESETS and replace(PRESETS[name], preset=None) == scheme:
        scheme = replace(scheme, preset=name)
    policy = data.get("input_scale")
    told = None if policy is None else parse_input_scale(policy)
    return replace(scheme, search=parse_search(data.get("search") or "none"), input_scale=told)


OWN_FIELDS: Final = ("preset", "search", "input_scale")
"""What describes a scheme and is nothing that a loader knows."""


def scheme_to_json(scheme: Scheme) -> dict[str, Any]:
    """Describe a scheme with compressed-tensors' field names; the inverse of `parse_scheme`.

    >>> parse_scheme(scheme_to_json(preset("NVFP4A16"))) == preset("NVFP4A16")
    True
    """
    out: dict[str, Any] = {"weights": weight_args_to_json(scheme.weights), "input_activations": None}
    if scheme.input_activations is not None:
        act = scheme.input_activations
        out["input_activations"] = {
            "num_bits": act.num_bits,
            "type": act.type,
            "strategy": act.strategy,
            "symmetric": act.symmetric,
            "dynamic": LOCAL if act.is_local else True,
            **({"group_size": act.group_size} if act.group_size is not None else {}),
            **({"scale_dtype": f"torch.{act.scale_dtype}"} if act.scale_dtype else {}),
        }
    if scheme.preset:
        out["preset"] = scheme.preset
    told = {} if scheme.input_scale is None else {"input_scale": scheme.input_scale.to_json()}
    return out | search_to_json(scheme) | told


def search_to_json(scheme: Scheme) -> dict[str, Any]:
    """What a search adds to keys and documents: nothing where there is none, so that those stay as they were."""
    return {} if scheme.search is None else {"search": scheme.search.to_json()}


def group_entry(scheme: Scheme) -> dict[str, Any]:
    """Describe a scheme as a group of `config_groups`, but for its targets.

    >>> group_entry(preset("W8A8"))["format"]
    'int-quantized'
    """
    fields = scheme_to_json(scheme)
    for own in OWN_FIELDS:
        fields.pop(own, None)
    return {**fields, "output_activations": None, "format": scheme.format}


def weight_args_to_json(args: WeightArgs) -> dict[str, Any]:
    """Describe weight arguments with compressed-tensors' field names."""
    return {
        "num_bits": args.num_bits,
        "type": args.type,
        "strategy": args.strategy,
        "symmetric": args.symmetric,
        "dynamic": False,
        **({"group_size": args.group_size} if args.group_size is not None else {}),
        **({"block_structure": list(args.block_structure)} if args.block_structure else {}),
        **({"scale_dtype": f"torch.{args.scale_dtype}"} if args.scale_dtype else {}),
        **({} if args.symmetric else {"zp_dtype": "torch.int8"}),
    }
