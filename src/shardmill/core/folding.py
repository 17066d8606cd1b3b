"""Fold the names of many tensors into a few: runs of numbers into ranges, names that differ in one word into braces.

Folding is exact: what is written stands for the given names and for no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

_Numbers = tuple[int, ...]
_Template = tuple[str | None, ...]
"""Components of a name; None stands for a number."""


def fold_names(names: Iterable[str]) -> tuple[str, ...]:
    """Fold names, sorted; numbers are whole components between dots.

    >>> fold_names(f"model.layers.{n}.self_attn.{leaf}_proj" for n in (0, 1, 2, 5) for leaf in "qkv")
    ('model.layers.[0-2,5].self_attn.{k,q,v}_proj',)
    >>> fold_names(["a.0.b.0", "a.0.b.1", "a.1.b.0"])
    ('a.0.b.[0-1]', 'a.1.b.0')
    """
    layers, others = _by_first_number(names)
    below: dict[_Template, dict[int, frozenset[_Numbers]]] = {}
    folded = [_fill(template, ranges) for template, sets in _split(others) for ranges in _fold_numbers(sets)]
    for tails, prefixes in layers.items():
        rests = [(template, frozenset(numbers)) for template, numbers in _split(tails)]
        for prefix in prefixes:
            *head, first, _ = prefix.split(".")
            for template, numbers in rests:
                below.setdefault((*head, None, *template), {})[int(first)] = numbers
    folded += [_fill(template, ranges) for template, firsts in below.items() for ranges in _fold_firsts(firsts)]
    return tuple(sorted(".".join(parts) for parts in _fold_words(folded)))


_TO_FIRST_NUMBER: Final = re.compile(r"(?:[^.]*\.)*?(?:0|[1-9][0-9]*)\.")


def _by_first_number(names: Iterable[str]) -> tuple[dict[frozenset[str], list[str]], list[str]]:
    """What follows the first number of a name, and the prefixes that end in this number; and names with none to cut at.

    Layers hold mostly the same modules: what is below them needs to be taken apart only once.
    """
    below: dict[str, list[str]] = {}
    others: list[str] = []
    prefix, tails = "", others
    for name in names:
        if not (prefix and name.startswith(prefix)):
            found = _TO_FIRST_NUMBER.match(name)
            if found is None:
                others.append(name)
                continue
            prefix = found[0]
            tails = below.setdefault(prefix, [])
        tails.append(name[len(prefix) :])
    layers: dict[frozenset[str], list[str]] = {}
    for prefix, tails in below.items():
        layers.setdefault(frozenset(tails), []).append(prefix)
        tails.clear()
    return layers, others


def _split(names: Iterable[str]) -> Iterable[tuple[_Template, set[_Numbers]]]:
    """Group the numbers of names by what stands around them."""
    by_template: dict[_Template, set[_Numbers]] = {}
    for name in names:
        parts = name.split(".")
        template = tuple([None if _is_plain_number(part) else part for part in parts])
        by_template.setdefault(template, set()).add(tuple([int(part) for part in parts if _is_plain_number(part)]))
    return by_template.items()


def _is_plain_number(part: str) -> bool:
    """Whether the component is a number that is written as Python writes it, so that it survives being one."""
    return part.isascii() and part.isdigit() and (part == "0" or part[0] != "0")


def _fold_numbers(numbers: set[_Numbers]) -> list[tuple[str, ...]]:
    """Cover a set of equally long tuples exactly by products of ranges, first component first."""
    if numbers == {()}:
        return [()]
    rests: dict[int, set[_Numbers]] = {}
    for first, *rest in numbers:
        rests.setdefault(first, set()).add(tuple(rest))
    return _fold_firsts({first: frozenset(tails) for first, tails in rests.items()})


def _fold_firsts(rests: Mapping[int, frozenset[_Numbers]]) -> list[tuple[str, ...]]:
    """The same, by the first component."""
    alike: dict[frozenset[_Numbers], list[int]] = {}
    for first in sorted(rests):
        alike.setdefault(rests[first], []).append(first)
    return [(_range(firsts), *tail) for tails, firsts in alike.items() for tail in _fold_numbers(set(tails))]


def _range(numbers: Sequence[int]) -> str:
    """Write sorted numbers: one as it is, several in brackets."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else f"[{text}]"


def _fill(template: _Template, ranges: Sequence[str]) -> tuple[str, ...]:
    pieces = iter(ranges)
    return tuple(next(pieces) if part is None else part for part in template)


def _fold_words(names: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Merge names that differ in one word, last component first; words keep what follows their last underscore."""
    for position in range(1, 1 + max(map(len, names), default=0)):
        groups: dict[tuple[int, tuple[str, ...], str, tuple[str, ...]], list[tuple[str, ...]]] = {}
        for name in names:
            if len(name) < position:
                groups.setdefault((len(name), name, "", ()), []).append(name)
                continue
            _, ending = _split_word(name[-position])
            after = name[len(name) - position + 1 :]
            groups.setdefault((len(name), name[: len(name) - position], ending, after), []).append(name)
        names = [_merge(group, position) for group in groups.values()]
    return names


def _split_word(word: str) -> tuple[str, str]:
    """Split into what may be put into braces and what stays; folded and numeric components stay whole."""
    if _is_plain_number(word) or word[:1] in ("[", "{"):
        return "", word
    stem, underscore, ending = word.rpartition("_")
    return (stem, underscore + ending) if stem else (word, "")


def _merge(group: Sequence[tuple[str, ...]], position: int) -> tuple[str, ...]:
    first = group[0]
    if len(group) == 1:
        return first
    at = len(first) - position
    _, ending = _split_word(first[at])
    stems = ",".join(sorted(_split_word(name[at])[0] for name in group))
    return (*first[:at], f"{{{stems}}}{ending}", *first[at + 1 :])
