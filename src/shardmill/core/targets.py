r"""Expressions that name the modules of several groups, so that every reader gives every module to the same group.

Readers disagree on who wins where two groups match one module, so no two may. Engines rename what stands in front of
the layers, so an expression begins with `re:.*` and with the component before the first number; it takes in more in
front only where modules of different groups differ nowhere else.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

EXPERT_ALIASES: Final = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Engines ask for the experts of w1/w2/w3 models under these names."""
_GATE, _UP = "gate_proj", "up_proj"
_EXPERTS: Final = "experts"
_RENAMED: Final = {"language_model": r"language_model(\.model)?"}
"""Components that engines write otherwise: `model.language_model.layers` is `language_model.model.layers` in vLLM."""


class _Tail(NamedTuple):
    """The end of a module's name: components, numbers taken out, and the numbers."""

    template: str
    numbers: tuple[str, ...]


def _tail(module: str, more: int) -> _Tail:
    """The name from `more` components before the one that precedes its first number on."""
    parts = module.split(".")
    first = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    tail = parts[max(0, first - 1 - more) :] if first is not None else parts
    return _Tail(
        ".".join("#" if part.isdecimal() else part for part in tail), tuple(part for part in tail if part.isdecimal())
    )


def disjoint_targets(modules: Mapping[str, int], groups: int) -> list[list[str]]:
    r"""Name every module of each group by expressions that match no module of another group.

    Args:
        modules: number of the group by module; every quantized one.

    >>> disjoint_targets({"model.layers.0.a": 0, "model.layers.1.a": 0, "model.layers.0.b": 1}, 2)
    [['re:.*(^|\\.)layers\\.\\d+\\.a$'], ['re:.*(^|\\.)layers\\.\\d+\\.b$']]
    >>> disjoint_targets({"x.layers.0.a": 0, "mtp.layers.0.a": 1}, 2)
    [['re:.*(^|\\.)x\\.layers\\.\\d+\\.a$'], ['re:.*(^|\\.)mtp\\.layers\\.\\d+\\.a$']]
    """
    by_template: dict[str, dict[int, list[tuple[str, ...]]]] = {}
    for module, tail in _tails(modules).items():
        by_template.setdefault(tail.template, {}).setdefault(modules[module], []).append(tail.numbers)
    targets: list[list[str]] = [[] for _ in range(groups)]
    for template, owners in sorted(by_template.items()):
        for group, members in owners.items():
            patterns = _number_patterns(members, exact=len(owners) > 1)
            spellings = [name for name in spellings_of(template) if name == template or name not in by_template]
            targets[group] += [_expression(name, pattern) for pattern in patterns for name in spellings]
    return [list(dict.fromkeys(names)) for names in targets]


def _tails(modules: Mapping[str, int]) -> dict[str, _Tail]:
    """The shortest tails by which modules of different groups differ; at the latest their whole names do."""
    found: dict[str, _Tail] = {}
    pending, more = list(modules), 0
    while pending:
        alike: dict[_Tail, set[int]] = defaultdict(set)
        tails = {module: _tail(module, more) for module in pending}
        for module, tail in tails.items():
            alike[tail].add(modules[module])
        mixed = {tail.template for tail, owners in alike.items() if len(owners) > 1}
        stuck = [module for module in pending if tails[module].template in mixed]
        found |= {module: tail for module, tail in tails.items() if tail.template not in mixed}
        pending, more = stuck, more + 1
    return found


def _expression(template: str, numbers: Sequence[str]) -> str:
    pieces = iter(numbers)
    body = r"\.".join(next(pieces) if part == "#" else _component(part) for part in template.split("."))
    return rf"re:.*(^|\.){body}$"


def _component(part: str) -> str:
    """One component as an expression.

    transformers takes the first group whose expression contains the text `experts` for that of the experts, so that
    `shared_experts` and its like are written without it.
    """
    escaped = _RENAMED.get(part) or re.escape(part)
    return escaped if part == _EXPERTS else escaped.replace(_EXPERTS, "expert[s]")


def _number_patterns(numbers: Sequence[tuple[str, ...]], *, exact: bool) -> list[tuple[str, ...]]:
    """Any number where one group owns the template; otherwise its layers, and all further numbers, spelled out."""
    if not exact:
        return [(r"\d+",) * len(numbers[0])]
    by_rest: dict[tuple[str, ...], list[str]] = {}
    for first, *rest in (entry for entry in numbers if entry):
        by_rest.setdefault(tuple(rest), []).append(first)
    by_layers: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for rest_numbers, layers in by_rest.items():
        by_layers.setdefault(tuple(sorted(set(layers), key=int)), []).append(rest_numbers)
    found: list[tuple[str, ...]] = []
    for layer_group, rests in by_layers.items():
        single = len(rests[0]) == 1
        tails = [(_either(sorted({rest[0] for rest in rests}, key=int)),)] if single else sorted(rests)
        found += [(_either(layer_group), *tail) for tail in tails]
    return found or [()]


def _either(numbers: Sequence[str]) -> str:
    return f"({'|'.join(numbers)})"


def spellings_of(module: str) -> tuple[str, ...]:
    """A module's own name, and for a projection of an expert the names under which engines ask for it.

    Experts without a gate are asked for one all the same.

    >>> spellings_of("m.layers.0.b.experts.0.w1")
    ('m.layers.0.b.experts.0.w1', 'm.layers.0.b.experts.0.gate_proj')
    >>> spellings_of("m.layers.#.mixer.experts.#.up_proj")[1], spellings_of("m.layers.0.mlp.up_proj")
    ('m.layers.#.mixer.experts.#.gate_proj', ('m.layers.0.mlp.up_proj',))
    """
    parent, _, leaf = module.rpartition(".")
    if parent.split(".")[-2:-1] != [_EXPERTS]:
        return (module,)
    alias = EXPERT_ALIASES.get(leaf) or (_GATE if leaf == _UP else None)
    return (module, f"{parent}.{alias}") if alias else (module,)


def dense_spellings(modules: Iterable[str]) -> set[str]:
    """Modules that stay dense, and the names under which engines ask for the first expert among them.

    >>> sorted(dense_spellings(["m.experts.0.w1", "m.experts.1.w1", "m.o_proj"]))
    ['m.experts.0.gate_proj', 'm.experts.0.w1', 'm.experts.1.w1', 'm.o_proj']
    """
    found = set(modules)
    firsts = [module for module in found if ".experts.0." in module]
    return found.union(*(spellings_of(module) for module in firsts))


def dense_expressions(dense: Iterable[str], quantized: Mapping[str, int], towers: Iterable[str]) -> list[str]:
    r"""Expressions for dense modules that hold however a loader calls what stands in front of the layers.

    Args:
        quantized: number of the group by module; no expression matches any of them.
        towers: components below which everything stays dense by default; one expression for each that does.

    >>> dense_expressions(["visual.blocks.0.fc", "model.layers.0.gate"], {"model.layers.0.up": 0}, ["visual"])
    ['re:.*(^|\\.)visual(\\..*)?$', 're:.*(^|\\.)layers\\.\\d+\\.gate$']
    """
    taken = {part for module in quantized for part in module.split(".")}
    whole = frozenset(towers) - taken
    found: dict[str, None] = {}
    rest: dict[str, int] = {}
    last = max(quantized.values(), default=-1) + 1
    for module in dense:
        if tower := next((part for part in module.split(".") if part in whole), None):
            found[rf"re:.*(^|\.){re.escape(tower)}(\..*)?$"] = None
        else:
            rest[module] = last
    return [*found, *disjoint_targets({**quantized, **rest}, last + 1)[last]]
