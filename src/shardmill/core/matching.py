"""Module name to group, by the patterns of a recipe: the one meaning of `Linear`, `re:` and `ignore`.

A pattern is either `re:<regex>`, matched from the start of the module name and open at the end, or a literal that
equals the whole module name. `Linear` in `targets`, or no target at all, means every quantizable weight. The first
group that matches a module keeps it; `ignore` beats every group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from shardmill.core.bounded import BoundedPattern
from shardmill.errors import Problem, RecipeInvalid, show

CATCH_ALL: Final = frozenset({"Linear", "re:", "re:.*", "re:^.*", "re:.*$", "re:^.*$", "re:.+"})
"""Targets that name no module in particular: default roles beat them."""


def split_name(tensor: str) -> tuple[str, str]:
    """Split a tensor name at its last dot into module and param name.

    >>> split_name("model.norm.weight"), split_name("sinks")
    (('model.norm', 'weight'), ('', 'sinks'))
    """
    module, _, param = tensor.rpartition(".")
    return module, param


_TO_ZERO: Final = bytes.maketrans(b"123456789", b"000000000")


def templates(names: Sequence[str]) -> list[str]:
    """The names with every ASCII digit written as 0: names of one template differ in nothing but digits.

    >>> templates(["model.layers.31.norm", "lm_head"])
    ['model.layers.00.norm', 'lm_head']
    """
    found = _zeroed("\n".join(names)).split("\n")
    return found if len(found) == len(names) else [_zeroed(name) for name in names]


def _zeroed(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").translate(_TO_ZERO).decode("utf-8", "surrogatepass")


_ANY_DIGIT: Final = re.compile(r"(?<!\\)\[0-9\]")
_DIGIT: Final = re.compile(r"[0-9]|\\N|\(\?P=")


def sees_digits(pattern: str) -> bool:
    r"""Whether a pattern may match one name of a template and not another.

    It cannot when its text has no digit but those of `[0-9]`, no character by name, and no reference to a named group.

    >>> [sees_digits(p) for p in ("lm_head", r"re:.*\.[0-9]+\.mlp\..*", r"re:.*\.\d\.mlp", "re:.*3.*", "w1")]
    [False, False, False, True, True]
    """
    return _DIGIT.search(_ANY_DIGIT.sub("", pattern)) is not None


def compile_pattern(pattern: str) -> BoundedPattern | None:
    """Compile `re:...`; None for a literal.

    Raises:
        RecipeInvalid: the expression is not valid.
    """
    if not pattern.startswith("re:"):
        return None
    try:
        return BoundedPattern(pattern[3:])
    except (re.error, RecursionError, OverflowError) as error:
        raise RecipeInvalid(
            [Problem(kind="pattern", message=f"pattern {show(pattern)} is no valid expression: {error}")]
        ) from error


@dataclass(slots=True)
class PatternSet:
    """Patterns in order, compiled once; remembers which ones matched.

    >>> PatternSet(["lm_head", "re:.*gate$"]).match("model.layers.0.mlp.gate")
    're:.*gate$'
    """

    patterns: Sequence[str]
    matched: set[str] = field(default_factory=set)
    _literals: dict[str, str] = field(init=False)
    _regexes: list[tuple[str, BoundedPattern]] = field(init=False)
    _numbered: frozenset[str] = field(init=False)
    """Literals that see digits."""
    _counting: list[tuple[str, BoundedPattern]] = field(init=False)
    """Expressions that see digits."""

    def __post_init__(self) -> None:
        self._literals = {p: p for p in self.patterns if not p.startswith("re:")}
        self._regexes = [(p, compiled) for p in self.patterns if (compiled := compile_pattern(p))]
        self._numbered = frozenset(filter(sees_digits, self._literals))
        self._counting = [entry for entry in self._regexes if sees_digits(entry[0])]

    @property
    def sees_digits(self) -> bool:
        """Whether any pattern does."""
        return bool(self._numbered or self._counting)

    def digit_hits(self, module: str) -> tuple[str, ...]:
        """Of the patterns that see digits, those that match; nothing is noted."""
        literal = (module,) if module in self._numbered else ()
        return (*literal, *[pattern for pattern, regex in self._counting if regex.match(module)])

    def match(self, module: str) -> str | None:
        """Return the first pattern that matches, literals before expressions; note every one that does."""
        hits = [self._literals[module]] if module in self._literals else []
        hits += [pattern for pattern, regex in self._regexes if regex.match(module)]
        self.matched.update(hits)
        return hits[0] if hits else None

    def unmatched(self) -> tuple[str, ...]:
        """Patterns that matched no module so far."""
        return tuple(p for p in self.patterns if p not in self.matched)


@dataclass(frozen=True, slots=True)
class Target:
    """The group a module belongs to and how explicitly it was named."""

    group: int
    pattern: str
    explicit: bool
    """Whether a pattern other than a catch-all named it."""


@dataclass(slots=True)
class Matcher:
    """Resolves modules for the ordered groups of a recipe."""

    ignore: PatternSet
    groups: list[tuple[bool, PatternSet]]
    """Per group: whether it catches all, and its other patterns."""

    @classmethod
    def build(cls, targets: Iterable[Sequence[str]], ignore: Sequence[str]) -> Matcher:
        """Compile the targets of every group and the ignore list."""
        groups = [
            (not names or any(n in CATCH_ALL for n in names), PatternSet([n for n in names if n not in CATCH_ALL]))
            for names in targets
        ]
        return cls(PatternSet(list(ignore)), groups)

    def ignored_by(self, module: str) -> str | None:
        """The ignore pattern that matches, if any."""
        return self.ignore.match(module)

    def target_of(self, module: str) -> Target | None:
        """The first group that matches, if any."""
        found: Target | None = None
        for number, (catches_all, patterns) in enumerate(self.groups):
            pattern = patterns.match(module)
            if found is None and (pattern or catches_all):
                found = Target(number, pattern or "Linear", explicit=pattern is not None)
        return found

    def digit_hits(self) -> Callable[[str], tuple[tuple[str, ...], ...]] | None:
        """What tells modules of one template apart: by module, the patterns that see digits and match it.

        Patterns treat modules of the same template and the same hits alike. None when no pattern sees digits.
        """
        sets = [patterns for patterns in (self.ignore, *(p for _, p in self.groups)) if patterns.sees_digits]
        if not sets:
            return None
        return lambda module: tuple([patterns.digit_hits(module) for patterns in sets])

    def unmatched(self) -> tuple[tuple[str, str], ...]:
        """`(where, pattern)` of every user pattern that matched nothing."""
        targets = [
            (f"targets of group {n}", p) for n, (_, patterns) in enumerate(self.groups) for p in patterns.unmatched()
        ]
        return tuple([("ignore", p) for p in self.ignore.unmatched()] + targets)
