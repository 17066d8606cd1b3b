"""Fused expert stacks: three-dimensional tensors that hold one projection of every expert.

Layouts of `gate_up_proj`, which Granite calls `input_linear` (and down `output_linear`), with E experts, width I,
hidden size H, and gate and up of expert e as `[out, in]`:

    rows         [E, 2I, H]   T[e][:I]      T[e][I:]        down [E, H, I]  T[e]
    columns      [E, H, 2I]   T[e].T[:I]    T[e].T[I:]      down [E, I, H]  T[e].T
    interleaved  [E, H, 2I]   T[e].T[0::2]  T[e].T[1::2]    down [E, I, H]  T[e].T

The layout follows from the sizes in config.json, confirmed by the shapes; where both axes fit, or alternating and
halved columns cannot be told apart, the architecture decides, and an unknown architecture is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardmill.core.architectures import published_layouts

HALVES: Final = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "input_linear": ("w1", "w3"),
    "output_linear": ("w2",),
}
"""Projections that one stack holds, in order, by the leaf of its name."""
STACK_PARENTS: Final = {
    "gate_up_proj": "experts",
    "down_proj": "experts",
    "input_linear": "block_sparse_moe",
    "output_linear": "block_sparse_moe",
}
"""Last component of the module that holds a stack, by leaf: elsewhere the same name means something else."""
_WIDTHS: Final = (
    "moe_intermediate_size",
    "expert_intermediate_size",
    "intermediate_size",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
)


@dataclass(frozen=True, slots=True)
class Stack:
    """The name of a fused expert stack, taken apart."""

    parent: str
    """Module that holds the stack."""
    leaf: str
    """Key of `HALVES`."""
    param: str
    """`weight` or `bias`."""

    @property
    def whole(self) -> str:
        """The stack as a module."""
        return f"{self.parent}.{self.leaf}"

    @property
    def prefix(self) -> str:
        """Module above its experts: the parent if that is called `experts`, else one of that name below it."""
        return self.parent if STACK_PARENTS[self.leaf] == "experts" else f"{self.parent}.experts"

    def modules(self, expert: int) -> tuple[str, ...]:
        """Names of the two-dimensional modules of one expert."""
        return tuple(f"{self.prefix}.{expert}.{half}" for half in HALVES[self.leaf])


def parse_stack(name: str, shape: Sequence[int]) -> Stack | None:
    """Recognise a fused expert stack, or its bias, by its last components and rank.

    >>> parse_stack("model.layers.0.mlp.experts.gate_up_proj", (4, 8, 2)).prefix
    'model.layers.0.mlp.experts'
    >>> parse_stack("m.experts.gate_up_proj_blocks", (4, 8, 2)) is None
    True
    >>> parse_stack("m.block_sparse_moe.input_linear.weight", (4, 8, 2)).modules(0)
    ('m.block_sparse_moe.experts.0.w1', 'm.block_sparse_moe.experts.0.w3')
    """
    trimmed, param = name, "weight"
    for ending, kind in ((".weight", "weight"), (".bias", "bias"), ("_bias", "bias")):
        if name.endswith(ending):
            trimmed, param = name.removesuffix(ending), kind
            break
    parent, _, leaf = trimmed.rpartition(".")
    expected = STACK_PARENTS.get(leaf)
    if expected is None or parent.rpartition(".")[2] != expected or len(shape) != (3 if param == "weight" else 2):
        return None
    return Stack(parent, leaf, param)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What config.json says of the architecture."""

    model_types: tuple[str, ...] = ()
    hidden: frozenset[int] = frozenset()
    widths: frozenset[int] = frozenset()


def read_sizes(config: Mapping[str, Any]) -> Sizes:
    """Collect model types, hidden sizes and expert widths from config.json and its nested configs.

    >>> sorted(read_sizes({"model_type": "mixtral", "hidden_size": 8, "intermediate_size": 16}).widths)
    [16]
    """
    levels = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    types = [level.get("model_type") for level in levels]
    return Sizes(
        tuple(dict.fromkeys(t for t in types if isinstance(t, str))),
        frozenset(level["hidden_size"] for level in levels if isinstance(level.get("hidden_size"), int)),
        frozenset(level[key] for level in levels for key in _WIDTHS if isinstance(level.get(key), int)),
    )


def _fits(leaf: str, shape: Sequence[int], hidden: int, width: int) -> set[str]:
    outer, inner = (2 * width, hidden) if len(HALVES[leaf]) > 1 else (hidden, width)
    fits = {"rows"} if tuple(shape[1:]) == (outer, inner) else set()
    return fits | ({"transposed"} if tuple(shape[1:]) == (inner, outer) else set())


def _axes(shapes: Mapping[str, Sequence[int]], sizes: Sizes) -> set[str]:
    """Orientations that fit every stack of one block for some hidden size and width of the config."""
    hidden, widths = sizes.hidden, sizes.widths
    if not (hidden and widths):
        hidden = frozenset(n for shape in shapes.values() for n in shape[1:])
        widths = hidden | frozenset(n // 2 for n in hidden if n % 2 == 0)
        if len(shapes) < 2:
            return {"rows", "transposed"}
    fitting: set[str] = set()
    for h in hidden:
        for width in widths:
            fitting |= set.intersection(*(_fits(leaf, shape, h, width) for leaf, shape in shapes.items()))
    return fitting


def choose_layout(shapes: Mapping[str, Sequence[int]], sizes: Sizes) -> str | None:
    """Choose the layout of one block's expert stacks, given as leaf -> shape; None when it cannot be told.

    >>> sizes = Sizes(("mixtral",), frozenset({8}), frozenset({16}))
    >>> choose_layout({"gate_up_proj": (4, 32, 8), "down_proj": (4, 8, 16)}, sizes)
    'rows'
    >>> choose_layout({"gate_up_proj": (4, 8, 32)}, Sizes(("unheard_of",), frozenset({8}), frozenset({16}))) is None
    True
    """
    axes = _axes(shapes, sizes)
    known = published_layouts(sizes.model_types)
    fitting = {layout for layout in known if ("rows" if layout == "rows" else "transposed") in axes}
    if not known and axes == {"rows"}:
        fitting = {"rows"}
    return fitting.pop() if len(fitting) == 1 else None
