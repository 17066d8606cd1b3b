"""Which scheme three kinds of reader find for a module in a written config, from the rules that each of them follows.

    first match          llm-compressor's `model_free_ptq`: `ignore`, then the first group that matches
    vLLM                 `compressed_tensors/utils.py`: `should_ignore_layer` and `find_matched_target`
    compressed-tensors   `utils/match.py`: the exact name, then expressions in alphabetical order, then class names;
                         transformers reads configs through it, and chooses for experts by `get_experts_scheme`

vLLM asks for merged layers under names that are in no checkpoint, and for all experts of a layer under those of the
first. A config is sound when every reader gives every quantized module its planned group, and no other module any.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from shardmill.core.bounded import BoundedPattern
from shardmill.core.fused import TABLE, FusedTable, fused_leaves
from shardmill.core.matching import compile_pattern, sees_digits, templates
from shardmill.errors import Problem, show

CONFIG_NAME: Final = "config.json"
KIND: Final = "config-unresolved"
_LINEAR: Final = "Linear"
_EXPERTS: Final = ".experts."
_ASKED: Final = ("gate_proj", "up_proj", "down_proj")
"""What vLLM asks for, whatever the projections of an expert are called."""


_EXPERT_CLASSES: Final = (f"FusedMoE{_LINEAR}",)
"""vLLM takes `Linear` in targets for its class of experts, too."""


class Target(NamedTuple):
    """One entry of a group's targets."""

    text: str
    group: str


class Layer(NamedTuple):
    """A layer that an engine builds."""

    names: tuple[str, ...]
    """Under which it asks for the scheme; all of them must give the same."""
    components: tuple[str, ...]
    """Modules of the checkpoint that a merged layer is made of; empty for others."""
    classes: tuple[str, ...]
    """Its class, and others that count as such."""
    members: tuple[str, ...]
    """Modules of the checkpoint that end up in it."""


@dataclass(slots=True)
class _Patterns:
    """Literals and expressions; answers for names of one template are kept where no expression sees digits."""

    texts: tuple[str, ...]
    _literals: dict[str, int] = field(init=False)
    _regexes: list[tuple[int, BoundedPattern]] = field(init=False)
    is_stable: bool = field(init=False)
    """Whether no expression sees digits."""
    _known: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._literals = {text: n for n, text in reversed(list(enumerate(self.texts))) if not text.startswith("re:")}
        self._regexes = [(n, regex) for n, text in enumerate(self.texts) if (regex := compile_pattern(text))]
        self.is_stable = not any(sees_digits(self.texts[n]) for n, _ in self._regexes)

    def literal(self, name: str) -> int | None:
        """Position of the literal that equals a name."""
        return self._literals.get(name)

    def regexes(self, name: str) -> tuple[int, ...]:
        """Positions of the expressions that match a name."""
        if not self._regexes:
            return ()
        key = templates([name])[0] if self.is_stable else name
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = tuple([n for n, regex in self._regexes if regex.match(name)])
        return found

    def first(self, name: str) -> int | None:
        """Position of the first entry that matches."""
        literal, regexes = self.literal(name), self.regexes(name)
        found = [*regexes[:1], *([] if literal is None else [literal])]
        return min(found, default=None)

    def matches(self, name: str) -> bool:
        """Whether any entry does."""
        return self.literal(name) is not None or bool(self.regexes(name))


@dataclass(slots=True)
class Resolver:
    """The groups and the ignore list of one `quantization_config`, as readers look into them."""

    targets: tuple[Target, ...]
    """In the order of the file."""
    _entries: _Patterns
    _ignore: _Patterns

    @classmethod
    def read(cls, section: Mapping[str, Any]) -> Resolver:
        """Take groups and ignore list from a `quantization_config`.

        Raises:
            RecipeInvalid: an expression is not valid.
        """
        groups = section.get("config_groups") or {}
        targets = tuple(Target(text, name) for name, entry in groups.items() for text in entry.get("targets") or ())
        entries = _Patterns(tuple(target.text for target in targets))
        return cls(targets, entries, _Patterns(tuple(section.get("ignore") or ())))

    @property
    def is_stable(self) -> bool:
        """Whether no expression tells names apart that differ in digits only."""
        return self._entries.is_stable and self._ignore.is_stable

    def literals(self, name: str) -> tuple[int | None, bool]:
        """Where a name stands among the targets, and whether it stands in the ignore list."""
        return self._entries.literal(name), self._ignore.literal(name) is not None

    def _group(self, position: int | None) -> str | None:
        return None if position is None else self.targets[position].group

    def first_match(self, module: str) -> str | None:
        """The group of a quantizable weight: `Linear` means every one.

        >>> read = Resolver.read({"config_groups": {"g": {"targets": ["Linear"]}}, "ignore": ["lm_head"]})
        >>> read.first_match("a.q_proj"), read.first_match("lm_head")
        ('g', None)
        """
        if self._ignore.matches(module):
            return None
        linear, named = self._entries.literal(_LINEAR), self._entries.first(module)
        return self._group(min((n for n in (linear, named) if n is not None), default=None))

    def compressed_tensors(self, module: str, classes: Sequence[str] = (_LINEAR,)) -> str | None:
        """The group that compressed-tensors gives a module of these classes.

        >>> groups = {"a": {"targets": ["re:.*z"]}, "b": {"targets": ["re:.*"]}, "c": {"targets": ["x.z"]}}
        >>> read = Resolver.read({"config_groups": groups})
        >>> read.compressed_tensors("y.z"), read.compressed_tensors("x.z")
        ('b', 'c')
        """
        if self._ignore.matches(module) or any(self._ignore.literal(name) is not None for name in classes):
            return None
        if (literal := self._entries.literal(module)) is not None:
            return self._last(literal)
        regexes = sorted(self._entries.regexes(module), key=lambda n: self.targets[n].text)
        named = sorted((name, n) for name in classes if (n := self._entries.literal(name)) is not None)
        if regexes:
            return self._last(regexes[0])
        return self._last(named[0][1]) if named else None

    def _last(self, position: int) -> str:
        """The group of an entry; of one that stands in several groups, the last."""
        text = self.targets[position].text
        return next(target.group for target in reversed(self.targets) if target.text == text)

    def vllm(self, layer: Layer) -> str | None:
        """The group that vLLM gives a layer; None where it runs dense.

        Raises:
            LookupError: it would refuse the layer; the message tells why.
        """
        found = {self._vllm_name(name, layer) for name in layer.names}
        if len(found) > 1:
            raise LookupError("its projections have several schemes")
        return found.pop()

    def _vllm_name(self, name: str, layer: Layer) -> str | None:
        ignored = [self._ignore.matches(part) for part in layer.components or (name,)]
        if self._ignore.literal(name) is not None:
            ignored = [True]
        if any(ignored) and not all(ignored):
            raise LookupError("a part of the merged layer is ignored, and another is not")
        if all(ignored):
            return None
        found = self._entries.first(name)
        if found is None:
            found = self._by_class(layer.classes)
        if found is None and layer.components:
            parts = [self._entries.first(part) for part in layer.components]
            found = parts[0] if None not in parts else None
        if found is None:
            raise LookupError("no target matches it, and ignore does not name it")
        return self._last(found)

    def _by_class(self, classes: Iterable[str]) -> int | None:
        """The first entry that a class name contains, whatever its case, or that matches one as an expression."""
        for name in classes:
            lower = name.lower()
            for position, target in enumerate(self.targets):
                if not target.text.startswith("re:") and target.text.lower() in lower:
                    return position
            if regexes := self._entries.regexes(name):
                return regexes[0]
        return None

    def transformers_experts(self) -> str | None:
        """The group that transformers takes for all experts of a model that it fuses."""
        groups = list(dict.fromkeys(target.group for target in self.targets))
        texts = {group: [target.text for target in self.targets if target.group == group] for group in groups}
        for group in groups:
            if any(text.startswith("re:") and "experts" in text for text in texts[group]):
                return group
        named = [group for group in groups if any(not text.startswith("re:") for text in texts[group])]
        return next(iter([*named, *groups]), None)


def runtime_layers(modules: Iterable[str], table: FusedTable = TABLE) -> Iterator[Layer]:
    """Layers that vLLM builds of linear modules: merged ones, one for all experts of a block, and single ones.

    >>> [layer.names for layer in runtime_layers(["a.q_proj", "a.k_proj", "a.o_proj"])]
    [('a.qkv_proj',), ('a.o_proj',)]
    >>> [layer.names[0] for layer in runtime_layers(["m.experts.7.w1", "m.experts.7.w2"])]
    ['m.experts.0.gate_proj']
    """
    below: dict[str, list[str]] = defaultdict(list)
    experts: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        head, found, rest = module.rpartition(_EXPERTS)
        parent, _, leaf = module.rpartition(".")
        if found and rest.count(".") == 1 and rest.partition(".")[0].isdecimal():
            experts[head].append(module)
        else:
            below[parent].append(leaf)
    for parent, leaves in below.items():
        yield from _merged(f"{parent}." if parent else "", leaves, table)
    for head, members in experts.items():
        asked = tuple(f"{head}.experts.0.{leaf}" for leaf in _ASKED)
        yield Layer(asked, (), _EXPERT_CLASSES, tuple(members))


def representatives(marks: Mapping[str, Hashable]) -> dict[str, int]:
    """Modules that stand for all others, and how many each stands for: blocks that differ in digits only are alike.

    Members of a block stay together, and so do the experts of a layer that differ from each other.

    Args:
        marks: by module, all that matters of it beside its name.

    >>> representatives({"layers.0.q": 1, "layers.1.q": 1, "layers.2.q": 2})
    {'layers.0.q': 2, 'layers.2.q': 1}
    """
    names = list(marks)
    blocks: dict[str, list[str]] = defaultdict(list)
    shape: dict[str, list[tuple[str, Hashable]]] = defaultdict(list)
    for name, leaf in zip(names, templates([name.rpartition(".")[2] for name in names]), strict=True):
        parent = name.rpartition(".")[0]
        blocks[parent].append(name)
        shape[parent].append((leaf, marks[name]))
    layers: dict[str, list[str]] = defaultdict(list)
    for parent in blocks:
        head, found, number = parent.rpartition(_EXPERTS)
        layers[head if found and number.isdecimal() else parent].append(parent)
    kept: dict[Hashable, dict[Hashable, list[str]]] = {}
    for head, template in zip(layers, templates(list(layers)), strict=True):
        signatures = {parent: tuple(shape[parent]) for parent in layers[head]}
        found_layer = kept.setdefault((template, frozenset(signatures.values())), {})
        for parent, signature in signatures.items():
            found_layer.setdefault(signature, []).append(parent)
    counts: dict[str, int] = {}
    for layer in kept.values():
        for parents in layer.values():
            counts |= dict.fromkeys(blocks[parents[0]], len(parents))
    return counts


def _merged(prefix: str, leaves: Sequence[str], table: FusedTable) -> Iterator[Layer]:
    rest = list(leaves)
    for group in fused_leaves(tuple(sorted(leaves)), table):
        runtime = _runtime_name(group, table)
        if runtime:
            rest = [leaf for leaf in rest if leaf not in group]
            ordered = _in_order(group, table)
            names = tuple(prefix + leaf for leaf in ordered)
            yield Layer((prefix + runtime,), names, (f"MergedColumnParallel{_LINEAR}",), names)
    for leaf in rest:
        yield Layer((prefix + leaf,), (), (f"ColumnParallel{_LINEAR}",), (prefix + leaf,))


def _runtime_name(group: Sequence[str], table: FusedTable) -> str:
    """The name of the row that holds most of a set."""
    rows = sorted(table.rows, key=lambda row: (-len(set(row.leaves) & set(group)), len(row.leaves)))
    return rows[0].runtime


def _in_order(group: Sequence[str], table: FusedTable) -> list[str]:
    order = {leaf: n for n, leaf in enumerate(leaf for row in table.rows for leaf in row.leaves)}
    return sorted(group, key=lambda leaf: order[leaf])


def check_resolution(
    section: Mapping[str, Any],
    quantized: Mapping[str, str],
    dense: Iterable[str],
    *,
    table: FusedTable = TABLE,
    runs_merged: bool = True,
) -> list[Problem]:
    """Find modules to which some reader gives another group than the planned one; one problem for each reader.

    Args:
        section: the `quantization_config`.
        quantized: planned group by module.
        dense: linear modules that are not quantized.
        runs_merged: whether merged layers are looked at, too; a recipe may ask for what engines refuse.

    >>> section = {"config_groups": {"g": {"targets": ["Linear"]}}, "ignore": []}
    >>> [problem.tensor for problem in check_resolution(section, {"a.up": "g"}, ["a.gate"])]
    ['a.gate', 'a.gate', 'a.gate']
    """
    read = Resolver.read(section)
    expected: dict[str, str | None] = dict.fromkeys(dense)
    expected |= quantized
    if read.is_stable:
        marks = {module: (group, read.literals(module)) for module, group in expected.items()}
        expected = {module: expected[module] for module in representatives(marks)}
        quantized = {module: group for module, group in quantized.items() if module in expected}
    wrong: dict[str, list[tuple[str, str]]] = {}
    for module, group in expected.items():
        for reader, found in (
            ("first match", read.first_match(module)),
            ("compressed-tensors", read.compressed_tensors(module)),
        ):
            if found != group:
                wrong.setdefault(reader, []).append((module, _differs(group, found)))
    if runs_merged:
        wrong |= {"vLLM": rows} if (rows := list(_wrong_layers(read, expected, table))) else {}
        wrong |= {"transformers": rows} if (rows := list(_wrong_experts(read, quantized))) else {}
    return [_problem(reader, rows) for reader, rows in wrong.items()]


def _differs(expected: str | None, found: str | None) -> str:
    return f"expected {show(expected) if expected else 'no scheme'}, found {show(found) if found else 'none'}"


def _wrong_layers(read: Resolver, expected: Mapping[str, str | None], table: FusedTable) -> Iterator[tuple[str, str]]:
    """Layers for which vLLM finds another group; where the plan itself treats members differently is told elsewhere."""
    for layer in runtime_layers(expected, table):
        groups = {expected[member] for member in layer.members}
        if len(groups) > 1:
            continue
        group = groups.pop()
        try:
            found = read.vllm(layer)
        except LookupError as error:
            yield layer.members[0], f"as {show(layer.names[0])} it is refused: {error}"
            continue
        if found != group:
            yield layer.members[0], f"as {show(layer.names[0])}: {_differs(group, found)}"


def _wrong_experts(read: Resolver, quantized: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Transformers has one scheme for the experts of all layers."""
    experts = {module: group for module, group in quantized.items() if _EXPERTS in module}
    if len(set(experts.values())) == 1:
        module, group = next(iter(experts.items()))
        found = read.transformers_experts()
        if found != group:
            yield module, _differs(group, found)


def _problem(reader: str, rows: Sequence[tuple[str, str]]) -> Problem:
    module, message = rows[0]
    more = f"; likewise {len(rows) - 1} more" if len(rows) > 1 else ""
    return Problem(
        file=CONFIG_NAME,
        tensor=module,
        kind=KIND,
        message=f"read by {reader}: {message}{more}",
        way_out="name these modules by targets that no other group has",
    )
