"""Expressions answer as `re` does, and in bounded time whatever the name."""

from __future__ import annotations

import re
import time
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.core.bounded import BoundedPattern, _Automaton, _parser
from shardmill.errors import RecipeInvalid

CATASTROPHIC = [
    r"(a+)+$",
    r"(a|a)*$",
    r"(a|aa)+$",
    r"(.*a){20}$",
    r"(.*a)(.*a)(.*a)(.*a)(.*a)(.*a)b",
    r"([a-z]+)*[0-9]$",
    r"(?:(?:a*)*)*b",
    r"a?" * 40 + "a" * 40 + "b",
    r"(\w+\.?)+!$",
    r"(x+x+)+y",
    r"(?i:(A+)+)$",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r".*.*.*.*.*.*=",
    r"(?:.*,){11}P",
    r"(.+)\s*=\s*(.+)\s*;\s*(.+)$",
]
UNBOUNDED = [
    r"(a+)+\1b",
    r"((a+)b?)*\2$",
    r"(?:(a)|b)*(?(1)c|d)+\1",
    r"(?>(a+)+)\1+b",
    r"(?:a*+)*?\s(a*)*\1b",
    r"(a{1,50}){1,50}b",
]


def names() -> list[str]:
    rng = Random(5)  # noqa: S311
    long = ["a" * 4096, "a" * 4095 + "!", "a." * 2048, "x" * 4096, "model.layers." * 315]
    return [*long, "".join(rng.choice("ab.x0_") for _ in range(4096))]


@pytest.mark.parametrize("expression", CATASTROPHIC)
def test_a_catastrophic_expression_is_answered(expression: str) -> None:
    # without a bound this takes longer than the universe is old: that the test ends is what it shows
    pattern = BoundedPattern(expression)
    for name in names():
        assert pattern.match(name) in (True, False)
    for name in ("", "a", "aaab", "aaaa", "xxy", "abc.def!", "aB"):
        assert pattern.match(name) == (re.match(expression, name) is not None)


@pytest.mark.parametrize("expression", UNBOUNDED)
def test_what_cannot_be_bounded_is_refused(expression: str) -> None:
    with pytest.raises(RecipeInvalid, match="may take for ever"):
        BoundedPattern(expression).match("a" * 4096)


ATOMS = [
    "a",
    "b",
    ".",
    r"\.",
    "[ab]",
    "[^a]",
    r"\d",
    r"\w",
    "^",
    "$",
    r"\b",
    r"\B",
    "(?i:A)",
    "(?=a)",
    "(?!b)",
    "(?<=a)",
]


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(ATOMS))
    kind = draw(st.integers(0, 3))
    inner = draw(expressions(depth=depth - 1))
    if kind == 0:
        return f"(?:{inner})" + draw(st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "+?", "{0,2}?"]))
    if kind == 1:
        return f"(?:{inner}|{draw(expressions(depth=depth - 1))})"
    return inner + draw(expressions(depth=depth - 1))


@given(expressions(), st.lists(st.text("abA1._", max_size=9), min_size=1, max_size=5))
@settings(max_examples=300)
def test_the_automaton_means_what_re_means(expression: str, found: list[str]) -> None:
    automaton = _Automaton.build(_parser.parse(expression))
    if automaton is None:
        return
    compiled = re.compile(expression)
    for name in (*found, "a\n", "a\nb"):
        assert automaton.match(name) == (compiled.match(name) is not None), (expression, name)


def ordinary(count: int, seed: int) -> list[str]:
    rng = Random(seed)  # noqa: S311
    pieces = [
        ".*",
        r"\d+",
        r"\.",
        "layers",
        "mlp",
        "(?:gate|up|down)_proj",
        "[0-9]+",
        "self_attn",
        "$",
        "experts",
        "q?",
    ]
    return ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 7))) for _ in range(count)]


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_ordinary_and_hostile_expressions_on_long_names(count: int) -> None:
    slowest, where, refused = 0.0, "", 0
    found = [*CATASTROPHIC, *UNBOUNDED, *ordinary(count - len(CATASTROPHIC) - len(UNBOUNDED), 3)]
    assert len(found) == count
    for expression in found:
        pattern = BoundedPattern(expression)
        for name in names()[:3] if count < 100 else names():
            started = time.perf_counter()
            try:
                pattern.match(name)
            except RecipeInvalid:
                refused += 1
            seconds = time.perf_counter() - started
            if seconds > slowest:
                slowest, where = seconds, expression
    assert refused >= len(UNBOUNDED)
    print(f"\n{count} expressions: slowest match {slowest:.3f} s ({where[:60]!r}), {refused} refusals")


def test_short_names_are_answered_by_re_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_tree: object) -> None:
        raise AssertionError("an automaton for an ordinary name")

    monkeypatch.setattr(_Automaton, "build", refuse)
    pattern = BoundedPattern(r".*layers\.\d+\.(self_attn|mlp)\..*_proj$")
    assert pattern.match("model.language_model.layers.10.mlp.down_proj")
