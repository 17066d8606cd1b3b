"""The `config_groups` of a written config, from parts that are quantized alike: our own, and those of a source.

One part gives the target `Linear`, the only form that all readers resolve alike; several give disjoint expressions that
name every quantized module. Nothing of a source's patterns is taken over: expressions of strangers would run in
engines, and could match what is new. They are resolved against the modules that are there, and written anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardmill.core.digest import canonical_json
from shardmill.core.resolve import Resolver
from shardmill.core.targets import disjoint_targets
from shardmill.errors import Problem, Refused, refuse, show

LAYOUT_VERSION: Final = "0.19.0"
"""compressed-tensors release whose on-disk layout is written."""
CONFIG_NAME: Final = "config.json"
_NOT_LAYOUT: Final = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
"""Arguments that tools write differently for the same layout, where they are plain."""
_LOST: Final = ("transform_config", "sparsity_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Modules that are quantized alike."""

    entry: Mapping[str, Any]
    """An entry of `config_groups` without its targets; its format is set."""
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The groups to be written."""

    config_groups: dict[str, dict[str, Any]]
    planned: dict[str, str]
    """Group by module."""

    @property
    def format(self) -> str:
        """The format of the whole: that of its groups if they agree."""
        formats = {entry["format"] for entry in self.config_groups.values()}
        return formats.pop() if len(formats) == 1 else "mixed-precision"


def group_keys(count: int) -> list[str]:
    """Names whose alphabetical order is that of priority, since writers sort them.

    >>> group_keys(2), group_keys(200)[3]
    (['group_00', 'group_01'], 'group_003')
    """
    width = max(2, len(str(count - 1)))
    return [f"group_{number:0{width}d}" for number in range(count)]


def write_groups(parts: Iterable[Part]) -> Groups:
    """Write one group for each way in which modules are quantized, in the order of the parts.

    >>> part = Part(entry={"weights": {"num_bits": 8}, "format": "f"}, modules=("a", "b"))
    >>> write_groups([part]).config_groups["group_00"]["targets"]
    ['Linear']
    """
    found: dict[bytes, tuple[Mapping[str, Any], list[str]]] = {}
    for part in parts:
        if part.modules:
            found.setdefault(_essence(part.entry), (part.entry, []))[1].extend(part.modules)
    entries = list(found.values())
    keys = group_keys(len(entries))
    number_of = {module: number for number, (_, modules) in enumerate(entries) for module in modules}
    targets = [["Linear"]] if len(entries) == 1 else disjoint_targets(number_of, len(entries))
    return Groups(
        config_groups={
            key: {"targets": names, **entry} for key, names, (entry, _) in zip(keys, targets, entries, strict=True)
        },
        planned={module: keys[number] for module, number in number_of.items()},
    )


def _essence(entry: Mapping[str, Any]) -> bytes:
    """What two entries have in common that describe the same layout and the same activations."""
    return canonical_json(
        {key: _plain(value) for key, value in entry.items() if value is not None and key != "targets"}
    )


def _plain(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    plain = {"torch.bfloat16", "torch.float16", "torch.float32", "torch.int8"}
    return {
        key: found
        for key, found in value.items()
        if found is not None and not (key in _NOT_LAYOUT and (key.startswith("observer") or found in plain))
    }


def write_section(groups: Groups, ignore: Iterable[str], kv_cache_scheme: Mapping[str, Any] | None) -> dict[str, Any]:
    """Write a whole `quantization_config`.

    Args:
        ignore: every linear layer that stays dense, by name.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": groups.format,
        "quantization_status": "compressed",
        "config_groups": groups.config_groups,
        "ignore": sorted(set(ignore)),
        "kv_cache_scheme": dict(kv_cache_scheme) if kv_cache_scheme else None,
        "global_compression_ratio": None,
        "transform_config": {},
        "version": LAYOUT_VERSION,
    }


def source_parts(section: Mapping[str, Any], kept: Sequence[str]) -> list[Part]:
    """Resolve the modules of a quantized source that stay as they are to its groups, as compressed-tensors does.

    Args:
        section: the source's `quantization_config`.
        kept: modules whose codes are copied.

    Raises:
        CheckpointInvalid: a module has no group, or the config says something that could not be taken over.

    >>> section = {"config_groups": {"g": {"targets": ["re:.*up$"], "weights": {}, "format": "f"}}, "ignore": []}
    >>> source_parts(section, ["a.up"])[0].modules
    ('a.up',)
    """
    if lost := [key for key in _LOST if section.get(key)]:
        message = f"{show(lost[0])} of the source cannot be taken over into a new config"
        raise refuse("config-merge", message, file=CONFIG_NAME, way_out="dequantize the source")
    read = Resolver.read(section)
    members: dict[str, list[str]] = {}
    for module in kept:
        group = read.compressed_tensors(module)
        if group is None:
            message = "it is quantized in the source, and no group of its config has it"
            raise refuse("config-merge", message, file=CONFIG_NAME, tensor=module)
        members.setdefault(group, []).append(module)
    groups = section["config_groups"]
    return [
        Part(entry=_entry(groups[name], section.get("format")), modules=tuple(modules))
        for name, modules in sorted(members.items(), key=lambda item: list(groups).index(item[0]))
    ]


def _entry(group: Mapping[str, Any], default_format: Any) -> dict[str, Any]:
    found = {key: value for key, value in group.items() if key != "targets"}
    return {
        **found,
        "output_activations": found.get("output_activations"),
        "format": found.get("format") or default_format,
    }


def merge_sections(
    parts: Sequence[Part],
    source: Mapping[str, Any],
    kept: Sequence[str],
    ignore: Iterable[str],
    *,
    has_kv_scales: bool,
    check: Callable[[Mapping[str, Any], Mapping[str, str]], list[Problem]] = lambda _section, _planned: [],
) -> dict[str, Any]:
    """Merge what is newly quantized with what a compressed-tensors source brings along.

    Args:
        parts: newly quantized, in order of priority.
        source: the source's `quantization_config`.
        kept: modules of the source whose codes are copied.
        ignore: linear layers that stay dense in the result.
        has_kv_scales: whether the result holds `k_scale` and `v_scale`; without them a scheme for the cache is dropped.
        check: looks at the result and the planned group by module; what it finds is refused.

    Raises:
        CheckpointInvalid: see `source_parts`; a module is both kept and newly quantized.
        Refused: `check` found something.
    """
    twice = {module for part in parts for module in part.modules}.intersection(kept)
    if twice:
        raise refuse("config-merge", "it is kept and quantized anew", file=CONFIG_NAME, tensor=min(twice))
    groups = write_groups([*parts, *source_parts(source, kept)])
    cache = source.get("kv_cache_scheme") if has_kv_scales else None
    section = write_section(groups, ignore, cache)
    if problems := check(section, groups.planned):
        raise Refused(problems)
    return section
