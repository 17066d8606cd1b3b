"""How the values of some weights and of their errors are spread: from the source and what the result gives back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Final

from shardmill.core.report import Histograms
from shardmill.core.statistics import Statistics
from shardmill.core.written import check_modules, code_shape
from shardmill.errors import Refused
from shardmill.stages.compare import Comparer, plan_of
from shardmill.stages.result import INTAKE, Readers, VerifyWatch, read_result, stored_shapes
from shardmill.storage.source import open_source

BINS: Final = 61
"""An odd number, so that zero lies in the middle of a bin."""


def measure_histograms(
    destination: str, source: str, weights: Mapping[str, Statistics], watch: VerifyWatch | None = None
) -> dict[str, Histograms]:
    """Read some weights of source and result, and count their values and errors.

    A weight that the result does not give back is left out: `verify` tells what is wrong with it.

    Args:
        weights: by module; their extent and largest error are the ends of the histograms.

    Raises:
        Refused: source or result is no sound checkpoint.
        SourceChanged: a file changed meanwhile.
    """
    told = watch or VerifyWatch()
    result = read_result(destination)
    if result.checkpoint.problems or result.config.problems:
        raise Refused({*result.checkpoint.problems, *result.config.problems})
    origin = open_source(source, INTAKE)
    plan = plan_of(result, origin)
    found: dict[str, Histograms] = {}
    with ExitStack() as stack:
        written, read = Readers(result.folder, stack), Readers(origin, stack)
        stored = stored_shapes(result, written)
        damaged = {problem.tensor for problem in check_modules(result.config, result.modules, stored)}
        shapes = {m: code_shape(p, stored) for m, p in result.modules.items() if m in weights and m not in damaged}
        units = [
            (shard, unit)
            for shard in plan.shards
            for tensor in shard.tensors
            if tensor.scheme >= 0 and len(tensor.spec.shape) > 1
            for unit in shard.units_of(tensor)
            if shapes.get(unit.module) == (unit.rows, unit.cols)
        ]
        told.on_total(sum(unit.rows * unit.row_bytes for _, unit in units))
        for shard, unit in units:
            comparer = Comparer(shard=shard, result=result, shapes=shapes, written=written, source=read, stated={})
            found[unit.module] = comparer.histograms(unit, weights[unit.module], BINS)
            told.on_bytes(unit.rows * unit.row_bytes)
    return found
