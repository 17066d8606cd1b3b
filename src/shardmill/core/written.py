"""Checks of a finished checkpoint by names and shapes alone: its config, its index, and the params of every module.

Works for results of any tool that writes compressed-tensors; what loaders read is taken as the truth, not the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardmill.core.dtypes import CODES
from shardmill.core.fused import TABLE, FusedTable, fused_sets
from shardmill.core.header import TensorSpec
from shardmill.core.index import CheckpointIndex
from shardmill.core.input_scale import PARAM as INPUT_SCALE
from shardmill.core.layout import OutputSpec, quantized_outputs
from shardmill.core.manifest import Manifest, ManifestShard
from shardmill.core.matching import CATCH_ALL, Matcher, split_name
from shardmill.core.plan import COPY, SPLIT, SourceShard
from shardmill.core.resolve import check_resolution
from shardmill.core.roles import role_of
from shardmill.core.scheme import (
    LOCAL,
    PRESETS,
    ActivationArgs,
    Scheme,
    WeightArgs,
    parse_weight_args,
    weight_args_to_json,
)
from shardmill.core.serving import Served
from shardmill.errors import Problem, Refused, show

CONFIG_NAME: Final = "config.json"
_QPARAMS: Final = frozenset(
    ["weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape", "weight_g_idx"]
)
_SCALE_DTYPES: Final = frozenset({"BF16", "F16", "F32"})
"""Other tools store FP8 and INT scales in the source's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenGroup:
    """One entry of `config_groups`."""

    name: str
    targets: tuple[str, ...]
    scheme: Scheme
    """Weights as written; activations only as far as the layout depends on them."""
    format: str
    """As written, for the group or for the whole checkpoint."""
    extras: frozenset[str]
    """Further params that its activations or its activation order bring along."""

    @property
    def entry(self) -> dict[str, Any]:
        """What of it dequantizing takes, in the terms of compressed-tensors."""
        return {"weights": weight_args_to_json(self.scheme.weights), "format": self.format}


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenConfig:
    """What a `quantization_config` says of the modules."""

    groups: tuple[WrittenGroup, ...]
    matcher: Matcher
    problems: tuple[Problem, ...]

    def group_of(self, module: str) -> WrittenGroup | None:
        """The first group whose targets match."""
        target = self.matcher.target_of(module)
        return self.groups[target.group] if target else None


PLAIN_CONFIG: Final = WrittenConfig(groups=(), matcher=Matcher.build([], []), problems=())
"""Of a checkpoint that is meant to be dense."""


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor and the shard that holds it."""

    shard: str
    data_start: int
    spec: TensorSpec


def parse_written_config(config: Mapping[str, Any]) -> WrittenConfig:
    """Read the `quantization_config` of a config.json; what cannot be read is a problem.

    >>> parse_written_config({}).problems[0].kind
    'config-unquantized'
    """
    section = config.get("quantization_config")
    if not isinstance(section, Mapping) or section.get("quant_method") != "compressed-tensors":
        message = "expected a quantization_config of compressed-tensors, found none"
        return WrittenConfig(groups=(), matcher=Matcher.build([], []), problems=(_problem(message, "unquantized"),))
    problems: list[Problem] = []
    entries = section.get("config_groups")
    groups = [
        group
        for name, entry in (entries.items() if isinstance(entries, Mapping) else ())
        if (group := _parse_group(str(name), entry, section.get("format"), problems))
    ]
    if not groups and not problems:
        problems.append(_problem("expected config_groups with weights, found none"))
    ignore = _strings(section.get("ignore") or [])
    try:
        matcher = Matcher.build([group.targets for group in groups], ignore or ())
    except Refused as error:
        problems += [_problem(problem.message) for problem in error.problems]
        matcher, groups = Matcher.build([], []), []
    if ignore is None:
        problems.append(_problem("ignore must be a list of strings"))
    return WrittenConfig(groups=tuple(groups), matcher=matcher, problems=tuple(problems))


def _problem(message: str, kind: str = "invalid") -> Problem:
    return Problem(file=CONFIG_NAME, kind=f"config-{kind}", message=message)


def _strings(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return tuple(value)
    return None


def _parse_group(name: str, entry: Any, default_format: Any, problems: list[Problem]) -> WrittenGroup | None:
    weights = entry.get("weights") if isinstance(entry, Mapping) else None
    targets = _strings(entry.get("targets")) if isinstance(entry, Mapping) else None
    if not isinstance(weights, Mapping) or not targets:
        problems.append(_problem(f"group {show(name)} needs targets and weights"))
        return None
    activations = entry.get("input_activations")
    written = str(entry.get("format") or default_format)
    try:
        args = parse_weight_args({key: value for key, value in weights.items() if key not in ("actorder", "observer")})
    except (Refused, TypeError, ValueError) as error:
        problems.append(_problem(f"group {show(name)}: {error}"))
        return None
    scheme = _layout_scheme(args, written, activations)
    if scheme is None:
        problems.append(
            _problem(f"group {show(name)}: format {show(written)} does not fit {args.num_bits}-bit {args.type}")
        )
        return None
    return WrittenGroup(
        name=name,
        targets=targets,
        scheme=scheme,
        format=written,
        extras=_extras(weights, activations),
    )


def _layout_scheme(args: WeightArgs, written: str, inputs: Any) -> Scheme | None:
    """The scheme whose layout a written format is; tools differ in which one they take for the same weights."""
    local = PRESETS["NVFP4"].input_activations
    if args.has_global_scale and isinstance(inputs, Mapping) and inputs.get("dynamic") == LOCAL:
        scheme = Scheme(weights=args, input_activations=local)
        return scheme if written == scheme.format else None
    alike = {"naive-quantized", f"{args.type}-quantized"}  # codes under `weight`, scales beside them
    for activations in (None, ActivationArgs(type=args.type)):
        scheme = Scheme(weights=args, input_activations=activations)
        if written == scheme.format or {written, scheme.format} <= alike:
            return scheme
    return None


def _extras(weights: Mapping[str, Any], activations: Any) -> frozenset[str]:
    found = {"weight_g_idx"} if weights.get("actorder") else set()
    if isinstance(activations, Mapping) and activations.get("dynamic") is not True:
        found |= {"input_scale", "input_zero_point", INPUT_SCALE}
    return frozenset(found)


def quantized_modules(tensors: Mapping[str, Located]) -> dict[str, dict[str, Located]]:
    """Collect the params of every module that holds codes or qparams, by param name.

    >>> spec = TensorSpec("m.weight_packed", "U8", (2, 8), 0, 16)
    >>> list(quantized_modules({"m.weight_packed": Located("s", 0, spec)})["m"])
    ['weight_packed']
    """
    found: dict[str, dict[str, Located]] = {}
    for name, located in tensors.items():
        module, param = split_name(name)
        if param in _QPARAMS or (param == "weight" and located.spec.dtype in CODES):
            found.setdefault(module, {})
    for name, located in tensors.items():
        module, param = split_name(name)
        if module in found:
            found[module][param] = located
    return found


def check_index(index: CheckpointIndex | None, shards: Sequence[SourceShard]) -> list[Problem]:
    """Index and headers name the same tensors in the same shards, and no tensor stands twice.

    Tensors of shards that could not be read are passed over: the shard itself is a problem already.
    """
    problems: list[Problem] = []
    owner: dict[str, str] = {}
    for shard in shards:
        for spec in shard.header.tensors:
            first = owner.setdefault(spec.name, shard.name)
            if first != shard.name:
                message = f"the same name stands in {show(first)}"
                problems.append(Problem(file=shard.name, tensor=spec.name, kind="duplicate-tensor", message=message))
    if index is None:
        return problems
    named = index.weight_map
    read = {shard.name for shard in shards}
    for name in sorted(named.keys() | owner.keys()):
        is_told = name not in owner and named[name] not in read
        if named.get(name) != owner.get(name) and not is_told:
            said = f"the index places it in {show(named[name])}" if name in named else "the index does not name it"
            found = f"it stands in {show(owner[name])}" if name in owner else "no shard has it"
            problems.append(Problem(file=index.name, tensor=name, kind="index-disagrees", message=f"{said}, {found}"))
    return problems


def code_shape(params: Mapping[str, Located], stored: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Rows and columns of a module's weight by its codes; None when they cannot be told.

    Args:
        stored: values of `weight_shape` tensors, by tensor name.
    """
    codes = params.get("weight_packed") or params.get("weight")
    if codes is None or len(codes.spec.shape) != 2:
        return None
    rows, cols = codes.spec.shape
    if codes.spec.dtype == "I32":
        return stored.get(params["weight_shape"].spec.name) if "weight_shape" in params else None
    return (rows, 2 * cols) if "weight_packed" in params else (rows, cols)


def check_modules(
    config: WrittenConfig, modules: Mapping[str, Mapping[str, Located]], stored: Mapping[str, tuple[int, int]]
) -> list[Problem]:
    """Every quantized module is covered by a group and has exactly the params of its format, with their shapes."""
    problems: list[Problem] = []
    for module, params in modules.items():
        first = next(iter(params.values()))
        problems += [
            Problem(file=first.shard, tensor=module, kind=kind, message=message)
            for kind, message in _module_defects(config, module, params, stored)
        ]
    return problems


def _module_defects(
    config: WrittenConfig, module: str, params: Mapping[str, Located], stored: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    ignored = config.matcher.ignored_by(module)
    group = config.group_of(module)
    if ignored is not None:
        yield "module-ignored", f"it is quantized, and {show(ignored)} in ignore says that it is not"
    elif group is None:
        yield "module-unmatched", "it is quantized, and no target of config_groups matches it"
    else:
        shape = code_shape(params, stored)
        if shape is None:
            found = ", ".join(map(show, sorted(params)))
            yield "params-differ", f"expected codes of a matrix and what tells its shape, found {found}"
        else:
            yield from _param_defects(group, module, params, shape)


def _param_defects(
    group: WrittenGroup, module: str, params: Mapping[str, Located], shape: tuple[int, int]
) -> Iterator[tuple[str, str]]:
    size = group.scheme.weights.group_size
    if size and shape[1] % size:
        yield "params-differ", f"group_size {size} of {show(group.name)} does not divide {shape[1]} columns"
        return
    expected = {spec.param: spec for spec in quantized_outputs(module, group.scheme, *shape, "BF16")}
    for param, spec in expected.items():
        if param not in params:
            yield "params-differ", f"{show(param)} is missing, format {show(group.format)} demands it"
        elif not _agrees(spec, params[param].spec):
            found = params[param].spec
            yield (
                "params-differ",
                f"{show(param)}: expected {spec.dtype} {list(spec.shape)}, found {found.dtype} {list(found.shape)}",
            )
    for param in sorted(params):
        if param.startswith(("weight", "input")) and param not in expected and param not in group.extras:
            yield "params-differ", f"{show(param)} has no place in format {show(group.format)}"


def _agrees(expected: OutputSpec, found: TensorSpec) -> bool:
    dtypes = _SCALE_DTYPES if expected.dtype == "BF16" else {expected.dtype}
    shapes = {expected.shape, ()} if expected.shape == (1,) else {expected.shape}
    return found.dtype in dtypes and found.shape in shapes


def check_dense(
    config: WrittenConfig, tensors: Mapping[str, Located], modules: Mapping[str, Any], *, is_strict: bool
) -> list[Problem]:
    """Every dense matrix is in `ignore` or out of reach of the targets, or loaders would look for its scales.

    Args:
        is_strict: also modules that engines do not run as plain linear layers, such as embeddings.
    """
    problems = []
    for name, located in tensors.items():
        module, param = split_name(name)
        if param != "weight" or len(located.spec.shape) != 2 or 0 in located.spec.shape or module in modules:
            continue
        target = config.matcher.target_of(module)
        if target is None or config.matcher.ignored_by(module) is not None:
            continue
        if is_strict or target.explicit or role_of(module) is None:
            message = f"it is not quantized, target {show(target.pattern)} names it and ignore does not"
            problems.append(Problem(file=located.shard, tensor=name, kind="dense-targeted", message=message))
    return problems


def check_global_scales(
    modules: Mapping[str, Mapping[str, Located]],
    values: Mapping[str, float],
    table: FusedTable = TABLE,
    param: str = "weight_global_scale",
) -> list[Problem]:
    """Members of a fused set have one global scale: engines merge them and keep only one.

    Args:
        values: of `param`, by module.
    """
    problems = []
    for members in fused_sets((module for module in modules if module in values), table):
        if len({values[member] for member in members}) > 1:
            each = ", ".join(f"{member.rpartition('.')[2]} {values[member]:.6g}" for member in members)
            problems.append(
                Problem(
                    file=modules[members[0]][param].shard,
                    tensor=f"{members[0]}.{param}",
                    kind="fused-scales-differ",
                    message=f"engines fuse these into one layer, expected one global scale, found {each}",
                    way_out="quantize again with a tool that shares it",
                )
            )
    return problems


def check_readers(
    section: Mapping[str, Any],
    config: WrittenConfig,
    modules: Iterable[str],
    tensors: Mapping[str, Located],
    table: FusedTable = TABLE,
    *,
    runs_merged: bool = True,
) -> list[Problem]:
    """Every reader gives every module what its params are: see `resolve`."""
    quantized = {module: group.name for module in modules if (group := config.group_of(module)) is not None}
    dense = [
        module
        for name, located in tensors.items()
        for module, param in [split_name(name)]
        if param == "weight" and len(located.spec.shape) == 2 and 0 not in located.spec.shape
        if module and module not in quantized
    ]
    return check_resolution(section, quantized, dense, table=table, runs_merged=runs_merged)


def served_by_result(
    config: WrittenConfig,
    modules: Mapping[str, Mapping[str, Located]],
    tensors: Mapping[str, Located],
    stored: Mapping[str, tuple[int, int]],
) -> Iterator[Served]:
    """The linear modules of a finished checkpoint, for `serving`."""
    for module, params in modules.items():
        shape, group = code_shape(params, stored), config.group_of(module)
        if shape is not None and group is not None:
            yield Served(module, *shape, group.scheme)
    for name, located in tensors.items():
        module, param = split_name(name)
        if param == "weight" and len(located.spec.shape) == 2 and module not in modules:
            yield Served(module, *located.spec.shape, None)


def check_manifest(manifest: Manifest, shards: Iterable[SourceShard], *, is_complete: bool) -> list[Problem]:
    """Shards and manifest name each other, and every tensor of both is accounted for in the other.

    Args:
        is_complete: whether every shard was read; otherwise an absent one is a problem already.
    """
    found = {shard.name: shard for shard in shards}
    problems = [
        Problem(file=name, kind="file-unlisted", message="the manifest does not name this shard")
        for name in found.keys() - {entry.name for entry in manifest.shards}
    ]
    for entry in manifest.shards:
        if entry.name in found:
            names = {spec.name for spec in found[entry.name].header.tensors}
            problems += [
                Problem(file=entry.name, tensor=name, kind="manifest-disagrees", message=message)
                for name, message in _accounts(entry, names)
            ]
        elif is_complete and not entry.is_empty:
            message = "the manifest names this shard, the index does not"
            problems.append(Problem(file=entry.name, kind="shard-missing", message=message))
    return problems


def _accounts(entry: ManifestShard, names: set[str]) -> Iterator[tuple[str, str]]:
    copied = {tensor.name for tensor in entry.tensors if tensor.action == COPY}
    copied |= {name for tensor in entry.tensors for name in tensor.outputs}
    modules = {weight.module for weight in entry.weights}
    split = tuple(
        f"{tensor.name.rpartition('.experts.')[0]}.experts."
        for tensor in entry.tensors
        if tensor.action == SPLIT and not tensor.scheme
    )
    quantized = {module for module, param in map(split_name, names) if param in ("weight", "weight_packed")}
    for name in sorted(copied - names):
        yield name, "the manifest says that it was copied, the shard does not have it"
    for module in sorted(modules - quantized):
        yield module, "the manifest says that it was quantized, the shard does not have it"
    for name in sorted(names - copied):
        module, param = split_name(name)
        is_param = module in modules and (param.startswith("weight") or param == INPUT_SCALE)
        if not is_param and not name.startswith(split):
            yield name, "the manifest does not account for it"


def unsafe_names(modules: Iterable[str]) -> frozenset[str]:
    """Module names that would be read as patterns."""
    return frozenset(module for module in modules if module.startswith("re:") or module in CATCH_ALL or not module)
