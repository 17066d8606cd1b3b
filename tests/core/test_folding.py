from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.folding import fold_names


def unfold(folded: str) -> set[str]:
    """What a folded name stands for, component by component."""
    components = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^.\[{]+|(?<=\.)(?=\.)|^(?=\.)|(?<=\.)$)+", folded)
    choices = []
    for component in components:
        braces = re.fullmatch(r"\{(.*)\}(.*)", component)
        if component.startswith("["):
            runs = [run.partition("-") for run in component[1:-1].split(",")]
            choices.append([str(n) for low, _, high in runs for n in range(int(low), int(high or low) + 1)])
        elif braces:
            choices.append([stem + braces[2] for stem in braces[1].split(",")])
        else:
            choices.append([component])
    return {".".join(parts) for parts in itertools.product(*choices)}


NAMES = st.lists(
    st.sampled_from(["model", "layers", "q_proj", "k_proj", "gate", "a_norm", "0", "1", "2", "3", "10", "00", "w1"]),
    min_size=1,
    max_size=4,
).map(".".join)


@given(st.sets(NAMES, min_size=1, max_size=30))
def test_folded_names_stand_for_exactly_the_given_ones(names: set[str]) -> None:
    covered = [name for folded in fold_names(names) for name in unfold(folded)]
    assert sorted(covered) == sorted(names)


@given(st.lists(NAMES, max_size=12), st.randoms())
def test_the_order_of_names_is_irrelevant(names: list[str], random: object) -> None:
    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fold_names(shuffled) == fold_names(names)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ()),
        ([""], ("",)),
        (["model.norm"], ("model.norm",)),
        (["a.#.b", "a.1.b"], ("a.#.b", "a.1.b")),
        (["a.0.b", "a.0.b"], ("a.0.b",)),
        (["m.007.x", "m.7.x"], ("m.007.x", "m.7.x")),
        ([f"m.{n}" for n in (3, 1, 2, 7, 9, 10)], ("m.[1-3,7,9-10]",)),
        (["m.٣.x", "m.3.x"], ("m.3.x", "m.٣.x")),
        (["l.mlp.gate_proj", "l.mlp.up_proj", "l.attn.q_proj"], ("l.attn.q_proj", "l.mlp.{gate,up}_proj")),
        (["l.q_proj.bias", "l.k_proj.bias"], ("l.{k,q}_proj.bias",)),
        (["{a,b}.x", "c.x"], ("c.x", "{a,b}.x")),
    ],
)
def test_examples(names: list[str], expected: tuple[str, ...]) -> None:
    assert fold_names(names) == expected


def test_a_large_model_folds_to_a_few_names() -> None:
    names = [f"model.layers.{n}.mlp.experts.{e}.{leaf}_proj" for n in range(3, 61) for e in range(64) for leaf in "gud"]
    assert fold_names(names) == ("model.layers.[3-60].mlp.experts.[0-63].{d,g,u}_proj",)
