"""What is unusual about a checkpoint or about its quantized weights, and worth a warning: each finding once, folded."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

from shardmill.core.dtypes import COMPUTABLE
from shardmill.core.folding import fold_names
from shardmill.core.fused import TABLE, FusedTable, fused_sets, is_fusable
from shardmill.core.plan import COPY, ShardPlan
from shardmill.core.receipt import WeightRecord
from shardmill.core.recipe import Recipe
from shardmill.core.scheme import WeightArgs
from shardmill.errors import Problem

FAR_ABOVE: Final = 3.0
"""Times the typical error from which on an error is worth a warning."""
_ZEROED_SHARE: Final = 0.05
_OUTLIER_SHARE: Final = 0.5
"""Of the sum of squares, in a single value."""
_MANY: Final = 64
"""Values from which on one of them is an outlier."""
_FOLDED: Final = 1000
"""Names that a warning folds; it tells the number of all."""
_NUMBER: Final = re.compile(r"\d+")


def check_copies(shards: Iterable[ShardPlan], kept: Collection[str] = ()) -> list[Problem]:
    """Warn of tensors that no scheme computes with, and of tensors without elements; one warning each.

    Args:
        kept: names of tensors of which it is known what they hold.
    """
    odd: list[tuple[str, str, str]] = []
    empty: list[tuple[str, str]] = []
    for shard in shards:
        for (name, dtype, shape, _, _), action, *_ in shard.tensors:
            if action == COPY and dtype not in COMPUTABLE and name not in kept:
                odd.append((shard.name, name, dtype))
            if 0 in shape:
                empty.append((shard.name, name))
    problems: list[Problem] = []
    if odd:
        kinds = ", ".join(f"{dtype} ({count})" for dtype, count in sorted(Counter(row[2] for row in odd).items()))
        tensor = _folded([name for _, name, _ in odd])
        message = f"copied byte for byte, since nothing computes with such dtypes: {kinds}"
        problems.append(Problem(file=odd[0][0], tensor=tensor, kind="dtype-copied", message=message))
    if empty:
        tensor = _folded([name for _, name in empty])
        message = f"no elements; copied as they are: {len(empty)} tensors in all"
        problems.append(Problem(file=empty[0][0], tensor=tensor, kind="empty-tensor", message=message))
    return problems


def _folded(names: Sequence[str]) -> str:
    return ", ".join(fold_names(names[:_FOLDED]))


def check_partners(matrices: Iterable[tuple[str, str]], table: FusedTable = TABLE) -> list[Problem]:
    """Warn of fused sets that lack a member which their like in other layers have; one warning.

    Args:
        matrices: `(shard, module)` of the matrices that engines may fuse with others.
    """
    leaves: dict[str, set[str]] = defaultdict(set)
    place: dict[str, str] = {}
    for shard, module in matrices:
        parent, _, leaf = module.rpartition(".")
        if is_fusable(module, table):
            leaves[parent].add(leaf)
            place.setdefault(parent, shard)
    whole: dict[str, set[str]] = defaultdict(set)
    for parent, found in leaves.items():
        whole[_NUMBER.sub("#", parent)] |= found
    lacking = [
        (parent, present, missing)
        for parent, found in sorted(leaves.items())
        if (missing := _missing(found, whole[_NUMBER.sub("#", parent)], table))
        for present in [", ".join(sorted(found))]
    ]
    if not lacking:
        return []
    parent, present, missing = lacking[0]
    more = f"; so it is {len(lacking) - 1} times more" if len(lacking) > 1 else ""
    message = f"engines fuse {present} with {missing}, which other layers have and this one lacks{more}"
    return [Problem(file=place[parent], tensor=parent, kind="fused-partner-missing", message=message)]


def _missing(found: set[str], whole: set[str], table: FusedTable) -> str:
    """Members of the fused sets of `found` that only `whole` has."""
    if found == whole:
        return ""
    sets = [{name.rpartition(".")[2] for name in group} for group in fused_sets([f"m.{leaf}" for leaf in whole], table)]
    return ", ".join(sorted({leaf for group in sets if group & found for leaf in group - found}))


def typical_error(args: WeightArgs) -> float:
    """Relative error of a Gaussian weight under a scheme, to tell the usual from the unusual.

    Measured: FP8 .027, NVFP4 .095, MXFP4 .112, MXFP8 .027, INT4 in groups of 128 .111 (asymmetric .100), INT8 per
    channel .0082. Other integer widths follow from the size of a step.

    >>> from shardmill.core.scheme import preset
    >>> [round(typical_error(preset(name).weights), 4) for name in ("FP8_DYNAMIC", "W8A8", "W8A16", "W4A16_ASYM")]
    [0.027, 0.0082, 0.0065, 0.1]
    """
    if args.type == "float":
        return 0.027 if args.num_bits == 8 else 0.095 if args.has_global_scale else 0.112
    four_bits = 0.139 if args.strategy != "group" else 0.111 if args.symmetric else 0.1
    return four_bits * 15 / ((1 << args.num_bits) - 1)


def check_statistics(weights: Iterable[tuple[str, WeightRecord]], recipe: Recipe) -> list[Problem]:
    """Name the weights that lost more than their scheme explains; one warning for each reason, folded.

    Args:
        weights: `(shard, weight)`; a warning names the first shard.
    """
    schemes = {group.scheme.label: group.scheme.weights for group in recipe.groups}
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for shard, weight in weights:
        args = schemes.get(weight.scheme)
        if args is not None:
            for finding in _unusual(weight, args):
                found.setdefault(finding, []).append((shard, weight.module))
    return [
        Problem(file=rows[0][0], tensor=", ".join(fold_names(m for _, m in rows)), kind=kind, message=message)
        for (kind, message), rows in found.items()
    ]


def _unusual(weight: WeightRecord, args: WeightArgs) -> Iterator[tuple[str, str]]:
    statistics = weight.statistics
    if statistics.nonzero >= _MANY and statistics.amax**2 > _OUTLIER_SHARE * statistics.squared_weight:
        message = "one value outweighs all others together: those that share its scale lose theirs"
        yield "outlier", message
    usual = typical_error(args)
    if not statistics.relative_error <= FAR_ABOVE * usual:
        yield "error-unusual", f"relative error more than {FAR_ABOVE:g} x the usual {usual:.2g} of {weight.scheme}"
    if args.num_bits >= 8 and statistics.zeroed > _ZEROED_SHARE * statistics.nonzero:
        yield "zeroed", f"more than {_ZEROED_SHARE:.0%} of what is not zero became zero at {args.num_bits} bits"
    elif 2 * statistics.zeroed > statistics.nonzero:
        yield "zeroed", "more than half of what is not zero became zero"
