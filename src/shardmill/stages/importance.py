"""A file that tells how much the error in each input feature of a module counts, for the search for scales.

It holds one float32 tensor `[in]` for each quantized module, such as the mean square of what enters it, named as the
module or with `.weight` or `.importance` behind. Its digest goes into the keys, and where it lies into nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from typing import Final

from shardmill.core.checks import check_shard
from shardmill.core.header import LENGTH_BYTES, TensorSpec, header_length, parse_header
from shardmill.core.layout import Unit
from shardmill.core.plan import Plan
from shardmill.core.recipe import Recipe
from shardmill.core.scheme import Scheme
from shardmill.errors import FileTooLarge, ObjectMissing, Problem, SourceChanged, refuse, show
from shardmill.storage.hashing import hash_bytes
from shardmill.storage.location import open_folder

LARGEST_BYTES: Final = 1 << 30
_SUFFIXES: Final = ("", ".weight", ".importance")


@dataclass(frozen=True, slots=True)
class Importance:
    """The content of such a file."""

    data: bytes
    digest: str
    data_start: int
    tensors: dict[str, TensorSpec]

    def find(self, module: str) -> TensorSpec | None:
        """The entry of a module."""
        return next((self.tensors[module + end] for end in _SUFFIXES if module + end in self.tensors), None)

    def of(self, spec: TensorSpec) -> memoryview:
        """The bytes of an entry."""
        return memoryview(self.data)[self.data_start + spec.begin : self.data_start + spec.end]


@lru_cache(maxsize=2)  # the shards of a run read one and the same
def read_importance(file: str) -> Importance:
    """Read such a file.

    Raises:
        CheckpointInvalid: absent, too large or malformed.
    """
    folder, _, name = file.rpartition("/")
    try:
        data = open_folder(folder or ("/" if file.startswith("/") else ".")).read(name, LARGEST_BYTES)
    except ObjectMissing as error:
        raise refuse("importance", "there is no such file of importance", file=file) from error
    except FileTooLarge as error:
        raise refuse("importance", f"larger than {LARGEST_BYTES} bytes", file=file) from error
    length = header_length(data[:LENGTH_BYTES], len(data), file=file)
    header = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data), file=file)
    tensors = {spec.name: spec for spec in header.tensors}
    return Importance(data, str(hash_bytes(data)), header.data_start, tensors)


def resolve_importance(recipe: Recipe) -> Recipe:
    """Put the digest of the file into every search that names one.

    Raises:
        CheckpointInvalid: as `read_importance`.
    """
    groups = []
    for group in recipe.groups:
        search = group.scheme.search
        if search is not None and search.importance_file:
            read_importance.cache_clear()  # the file may be another one by now
            found = replace(search, importance=read_importance(search.importance_file).digest)
            group = replace(group, scheme=replace(group.scheme, search=found))  # noqa: PLW2901 - the same, resolved
        groups.append(group)
    return replace(recipe, groups=tuple(groups))


def check_importance(plan: Plan) -> list[Problem]:
    """Find every quantized module whose importance is absent or cannot be used."""
    found: list[Problem] = []
    for shard in plan.shards:
        weighed = {
            number for number, scheme in enumerate(shard.schemes) if scheme.search and scheme.search.importance_file
        }
        unsound = {problem.tensor for problem in check_shard(shard)} if weighed else set()
        for tensor in shard.tensors:
            if tensor.scheme in weighed and tensor.spec.name not in unsound:
                for unit in shard.units_of(tensor):
                    found += _check(shard.name, unit, shard.schemes[tensor.scheme])
    return sorted(found)


def _check(shard: str, unit: Unit, scheme: Scheme) -> Iterator[Problem]:
    found = _file_of(scheme)
    module, cols = unit.module, unit.cols
    spec = found.find(module) if found else None
    way_out = "ignore the module, or give it an entry"
    if found is None or spec is None:
        message = f"the file of importance has no entry {show(module)}"
        yield Problem(file=shard, tensor=module, kind="importance-missing", message=message, way_out=way_out)
    elif spec.dtype != "F32" or spec.shape != (cols,):
        message = f"importance must be F32 [{cols}], found {spec.dtype} {list(spec.shape)}"
        yield Problem(file=shard, tensor=module, kind="importance-shape", message=message, way_out=way_out)
    elif not all(0 <= value < inf for value in found.of(spec).cast("f")):
        message = "importance must be finite and not below 0"
        yield Problem(file=shard, tensor=module, kind="importance-value", message=message, way_out=way_out)


def _file_of(scheme: Scheme) -> Importance | None:
    if scheme.search is None or not scheme.search.importance_file:
        return None
    return read_importance(scheme.search.importance_file)


def importance_of(scheme: Scheme, module: str) -> memoryview | None:
    """How much errors in each input feature of a module count; None for all alike.

    Raises:
        SourceChanged: the file is not the planned one.
    """
    found = _file_of(scheme)
    if found is None or scheme.search is None:
        return None
    spec = found.find(module)
    if spec is None or found.digest != scheme.search.importance:
        raise SourceChanged(f"{show(scheme.search.importance_file)} changed after the plan was made; run again")
    return found.of(spec)
