r"""Regular expressions that cannot be made to run for ever: the answers of `re`, in time that is bounded beforehand.

`re` backtracks: `(a+)+$` doubles its work with every letter of a name, and nothing can stop it while it does. So how
many ways an expression may split a name is counted from its syntax tree. Where that is few, `re` answers. Else an
automaton does, which walks over the name once with all ways at the same time; it asks `re` about single characters and
positions, so that both mean the same. An expression that neither can answer in time is refused: one that repeats what
refers back to a group, for instance.
"""

from __future__ import annotations

import importlib
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from shardmill.errors import Problem, RecipeInvalid, show

_parser: Final[Any] = importlib.import_module("re._parser")
_compiler: Final[Any] = importlib.import_module("re._compiler")
_op: Final[Any] = importlib.import_module("re._constants")
_STEPS_LOG2: Final = 22.0
"""Steps that `re` may take for one name, as a power of two: about a tenth of a second."""
_SPENT_SECONDS: Final = 0.5
"""What `re` may spend in all before the automaton takes over, whose answers are the same."""
_STATES: Final = 500
_FEW: Final = 64
_LONGEST: Final = 1 << 16
_EXPONENTIAL: Final = 99
"""More repeats than any name allows."""


class _Ways(NamedTuple):
    """How many ways there are to match a name of n characters: at most `2**log2 * binomial(n + repeats, repeats)`."""

    repeats: int = 0
    log2: float = 0.0

    def times(self, other: _Ways) -> _Ways:
        return _Ways(min(_EXPONENTIAL, self.repeats + other.repeats), self.log2 + other.log2)


class _Cost(NamedTuple):
    ways: _Ways
    """That are tried again when what follows fails."""
    explored: _Ways
    """That are tried at most."""


_ONE: Final = _Cost(_Ways(), _Ways())


def _cost(items: Sequence[tuple[Any, Any]]) -> _Cost:
    ways, explored = _Ways(), _Ways()
    for operator, argument in items:
        cost = _cost_of(operator, argument)
        explored = max(explored, ways.times(cost.explored))
        ways = ways.times(cost.ways)
    return _Cost(ways, max(explored, ways))


def _cost_of(operator: Any, argument: Any) -> _Cost:
    if operator is _op.SUBPATTERN:
        return _cost(argument[3])
    if operator in (_op.BRANCH, _op.GROUPREF_EXISTS):
        branches = argument[1] if operator is _op.BRANCH else argument[1:]
        return _either([_cost(branch) for branch in branches if branch is not None])
    if operator in (_op.MAX_REPEAT, _op.MIN_REPEAT):
        return _repeated(*argument)
    if operator is _op.GROUPREF:
        return _Cost(_Ways(), _Ways(1))
    explored = _ONE.explored  # of what is never tried another way once it has matched
    if operator is _op.POSSESSIVE_REPEAT:
        explored = _repeated(*argument).explored
    elif operator in (_op.ASSERT, _op.ASSERT_NOT):
        explored = _cost(argument[1]).explored
    elif operator is _op.ATOMIC_GROUP:
        explored = _cost(argument).explored
    return _Cost(_Ways(), explored)


def _either(branches: Sequence[_Cost]) -> _Cost:
    more = _Ways(0, math.log2(len(branches)) if branches else 0.0)
    ways = max((branch.ways for branch in branches), default=_Ways())
    explored = max((branch.explored for branch in branches), default=_Ways())
    return _Cost(ways.times(more), explored.times(more))


def _repeated(least: int, most: int, items: Sequence[tuple[Any, Any]]) -> _Cost:
    inner = _cost(items)
    is_plain = inner.explored == _Ways()
    choices = int(most) - least + 1
    if is_plain:
        ways = _Ways(0, math.log2(choices)) if choices <= _FEW else _Ways(1)
        return _Cost(ways, ways)
    if int(most) > _FEW or inner.explored.repeats * int(most) >= _EXPONENTIAL:
        return _Cost(_Ways(_EXPONENTIAL), _Ways(_EXPONENTIAL))
    ways = _Ways(inner.explored.repeats * int(most), inner.explored.log2 * int(most) + math.log2(choices))
    return _Cost(ways, ways)


def _safe_length(ways: _Ways) -> int:
    """Longest name for which there are few enough ways."""

    def is_safe(length: int) -> bool:
        n, k = length, ways.repeats
        splits = math.lgamma(n + k + 1) - math.lgamma(n + 1) - math.lgamma(k + 1)
        return splits / math.log(2) + ways.log2 <= _STEPS_LOG2

    if ways.repeats >= _EXPONENTIAL or not is_safe(1):
        return 0
    low, high = 1, _LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_safe(middle) else (low, middle - 1)
    return low


class _Unsupported(Exception):
    """The automaton has no state for this."""


_ACCEPT: Final = 0
_CHARACTER: Final = 1
_POSITION: Final = 2
_SPLIT: Final = 3


@dataclass(slots=True)
class _Automaton:
    """All ways through an expression at once; states are numbers, and the first one accepts."""

    kinds: list[int] = field(default_factory=lambda: [_ACCEPT])
    tests: list[Callable[[str, int], bool]] = field(default_factory=lambda: [lambda _text, _at: True])
    targets: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    start: int = 0
    is_plain: bool = True
    """Whether no test within a name depends on more than the character."""
    known: dict[tuple[frozenset[int], str], frozenset[int]] = field(default_factory=dict)

    @classmethod
    def build(cls, tree: Any) -> _Automaton | None:
        """Make one of a syntax tree; None where it has no states for it, or too many."""
        automaton = cls()
        try:
            automaton.start = automaton._sequence(tree, tree.state.flags, tree, _ACCEPT)
        except _Unsupported:
            return None
        return automaton

    def _add(self, kind: int, targets: tuple[int, ...], test: Callable[[str, int], bool] | None = None) -> int:
        if len(self.kinds) >= _STATES:
            raise _Unsupported
        self.kinds.append(kind)
        self.targets.append(targets)
        self.tests.append(test or self.tests[0])
        return len(self.kinds) - 1

    def _sequence(self, items: Sequence[Any], flags: int, tree: Any, following: int) -> int:
        for operator, argument in reversed(list(items)):
            following = self._item(operator, argument, flags, tree, following)
        return following

    def _item(self, operator: Any, argument: Any, flags: int, tree: Any, following: int) -> int:
        if operator in (_op.LITERAL, _op.NOT_LITERAL, _op.ANY, _op.IN):
            return self._add(_CHARACTER, (following,), _tester(operator, argument, flags, tree))
        if operator is _op.SUBPATTERN:
            _, added, removed, items = argument
            return self._sequence(items, _combined(flags, added, removed), tree, following)
        if operator is _op.BRANCH:
            branches = [self._sequence(branch, flags, tree, following) for branch in argument[1]]
            return self._add(_SPLIT, tuple(branches))
        if operator in (_op.MAX_REPEAT, _op.MIN_REPEAT):
            return self._repeat(argument, flags, tree, following)
        if operator is _op.AT or (operator in (_op.ASSERT, _op.ASSERT_NOT) and _is_cheap(argument[1])):
            self.is_plain &= operator is _op.AT and argument in _EDGES
            return self._add(_POSITION, (following,), _tester(operator, argument, flags, tree))
        raise _Unsupported

    def _repeat(self, argument: Any, flags: int, tree: Any, following: int) -> int:
        least, most, items = argument
        after = following
        if most is _op.MAXREPEAT:
            after = self._add(_SPLIT, ())
            self.targets[after] = (self._sequence(items, flags, tree, after), following)
        else:
            for _ in range(int(most) - least):
                after = self._add(_SPLIT, (self._sequence(items, flags, tree, after), following))
        for _ in range(least):
            after = self._sequence(items, flags, tree, after)
        return after

    def match(self, name: str) -> bool:
        """Whether the expression matches from the start of a name, open at the end."""
        is_plain = self.is_plain and "\n" not in name
        states = self._reached({self.start}, name, 0)
        for at, character in enumerate(name):
            if _ACCEPT in states or not states:
                break
            key = (states, character)
            if not is_plain or at + 1 == len(name):
                states = self._step(states, name, at)
            elif key in self.known:
                states = self.known[key]
            else:
                states = self.known[key] = self._step(states, name, at)
        if len(self.known) > _LONGEST:
            self.known.clear()
        return _ACCEPT in states

    def _step(self, states: frozenset[int], name: str, at: int) -> frozenset[int]:
        found = {self.targets[s][0] for s in states if self.kinds[s] == _CHARACTER and self.tests[s](name, at)}
        return self._reached(found, name, at + 1)

    def _reached(self, states: set[int], name: str, at: int) -> frozenset[int]:
        """What is reached from some states without another character."""
        seen: set[int] = set()
        todo = list(states)
        while todo:
            state = todo.pop()
            if state in seen:
                continue
            seen.add(state)
            kind = self.kinds[state]
            if kind == _SPLIT or (kind == _POSITION and self.tests[state](name, at)):
                todo += self.targets[state]
        return frozenset(state for state in seen if self.kinds[state] in (_ACCEPT, _CHARACTER))


_EDGES: Final = frozenset({_op.AT_BEGINNING, _op.AT_BEGINNING_STRING, _op.AT_END, _op.AT_END_STRING})
_TYPE_FLAGS: Final = re.ASCII | re.LOCALE | re.UNICODE


def _is_cheap(items: Any) -> bool:
    """Whether a look around takes time in proportion to the name, and refers to nothing outside."""
    return _cost(items).explored.repeats <= 1 and not _has_reference(items)


def _has_reference(value: Any) -> bool:
    if value is _op.GROUPREF or value is _op.GROUPREF_EXISTS:
        return True
    is_tree = isinstance(value, list | tuple) or hasattr(value, "data")
    return is_tree and any(map(_has_reference, getattr(value, "data", value)))


def _combined(flags: int, added: int, removed: int) -> int:
    if added & _TYPE_FLAGS:
        flags &= ~_TYPE_FLAGS
    return (flags | added) & ~removed


def _tester(operator: Any, argument: Any, flags: int, tree: Any) -> Callable[[str, int], bool]:
    """Ask `re` itself about one item at one position."""
    state = _parser.State()
    state.flags = int(flags)
    state.groupdict, state.groupwidths = tree.state.groupdict, tree.state.groupwidths
    compiled = _compiler.compile(_parser.SubPattern(state, [(operator, argument)]), int(flags))
    return lambda name, at: compiled.match(name, at) is not None


class BoundedPattern:
    r"""A compiled expression; `match` tells whether it matches from the start of a name, open at the end.

    >>> BoundedPattern("(a+)+$").match("a" * 4000 + "b")
    False
    >>> BoundedPattern(r".*layers\.[0-9]+\.").match("model.layers.3.mlp")
    True
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self._regex = re.compile(expression)
        self._tree = _parser.parse(expression)
        self._ways = _cost(self._tree).explored
        self._longest = _safe_length(self._ways)
        self._automaton: _Automaton | None = None
        self._is_built = False
        self._spent = 0.0

    def match(self, name: str) -> bool:
        """Whether it matches.

        Raises:
            RecipeInvalid: there is no telling in bounded time.
        """
        if self._ways.repeats < 2 and len(name) <= self._longest:
            return self._regex.match(name) is not None
        if len(name) <= self._longest and (self._spent <= _SPENT_SECONDS or self._walker() is None):
            started = time.perf_counter()
            found = self._regex.match(name) is not None
            self._spent += time.perf_counter() - started
            return found
        walker = self._walker()
        if walker is None:
            message = f"pattern {show('re:' + self.expression)} may take for ever on a name of {len(name)} characters"
            way_out = "repeat nothing that repeats, and refer to no group"
            raise RecipeInvalid([Problem(kind="pattern", message=message, way_out=way_out)])
        return walker.match(name)

    def _walker(self) -> _Automaton | None:
        if not self._is_built:
            self._automaton, self._is_built = _Automaton.build(self._tree), True
        return self._automaton
