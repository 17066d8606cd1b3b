"""Between planning and work, where a recipe allows NaN and Inf: find the weights that hold any, for an exact plan.

A shard whose result the store holds is not read: its weights were finite. All others are read once more than otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from shardmill.core.nonfinite import Kept, keep
from shardmill.core.plan import COPY, Plan, ShardPlan
from shardmill.core.receipt import NonFinite
from shardmill.errors import Interrupted
from shardmill.kernels.threads import cores
from shardmill.stages.quantize import find_stored
from shardmill.storage.folder import Reader
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import Store


def find_kept(plan: Plan, source: SourceFolder, store: Store, stop: Callable[[], bool] = bool) -> Kept:
    """Look at the values of every weight that is to be quantized, and choose what is copied instead.

    Raises:
        CheckpointInvalid: a source shard is gone.
        StorageFailed: reading failed.
        Interrupted: stopped on request.
    """
    with ThreadPoolExecutor(cores(), thread_name_prefix="scan") as pool:
        parts = pool.map(lambda shard: _scan(shard, source, store, stop), plan.shards)
        return keep(plan, [found for part in parts for found in part])


def _scan(shard: ShardPlan, source: SourceFolder, store: Store, stop: Callable[[], bool]) -> list[NonFinite]:
    from shardmill.kernels.scan import scan_tensor  # kernels take long to import, and a hit needs none

    wanted = [t.spec for t in shard.tensors if t.action != COPY and t.scheme >= 0 and t.decode is None]
    if not wanted or find_stored(shard, source, store) is not None:
        return []
    found = []
    with source.open(shard.name) as reader:
        for spec in wanted:
            if stop():
                raise Interrupted("stopped on request; finished shards stay in the store, run again to go on")
            entry = scan_tensor(spec, partial(_read, reader, shard.data_start + spec.begin))
            if entry is not None:
                found.append(entry)
    return found


def _read(reader: Reader, start: int, offset: int, view: memoryview) -> None:
    reader.read_into(start + offset, view)
