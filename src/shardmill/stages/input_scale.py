"""Global scales of activations from a donor: a checkpoint of the same architecture that was calibrated.

Of the donor only headers and the scales themselves are read, in ranges of at most `RANGE_BYTES`, while the plan is
made; from then on they are numbers in the plan. `core.input_scale` says what the numbers mean.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from shardmill.core.checks import check_shard
from shardmill.core.header import TensorSpec
from shardmill.core.input_scale import DONOR, PARAM, is_sound, reciprocal, scales_digest, shared_scales
from shardmill.core.limits import Intake
from shardmill.core.plan import Plan, ShardPlan, SourceShard
from shardmill.core.recipe import Recipe
from shardmill.core.scheme import Scheme
from shardmill.errors import Problem, Refused, SourceChanged, TransferDamaged, show
from shardmill.storage.folder import Reader
from shardmill.storage.location import open_folder
from shardmill.storage.source import SourceFolder, read_shards

RANGE_BYTES: Final = 1 << 20
"""The most that one request asks for; scales that lie near each other come together."""
_GAP_BYTES: Final = 64 << 10
_MODELOPT: Final = ("input_scale", "weight_scale_2")
"""The scale in ModelOpt's convention, and what tells that it is NVFP4's: FP8 has another of the same name."""
_SHOWN: Final = 3
_SCALE_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class _Entry:
    """The scale of one module in a donor."""

    shard: SourceShard
    spec: TensorSpec
    is_reciprocal: bool
    """Whether it is stored as ModelOpt does."""

    @property
    def begin(self) -> int:
        """First byte, counted from the start of the file."""
        return self.shard.header.data_start + self.spec.begin


def take_input_scales(plan: Plan, intake: Intake) -> tuple[Plan, list[Problem]]:
    """Put the scales of the donors that a recipe names into its plan; returns what stands against it, too.

    Args:
        intake: what is taken in of a donor.

    Raises:
        SourceChanged: a donor changed meanwhile.
        TransferDamaged: two reads of one scale differ.
    """
    scales: dict[str, float] = {}
    digests: dict[str, str] = {}
    problems: list[Problem] = []
    for location, modules in _wanted(plan).items():
        try:
            found = shared_scales(_read_donor(location, modules, intake), plan.recipe.fused_table)
        except Refused as error:
            problems += error.problems
            continue
        scales |= found
        digests[location] = scales_digest(found)
    if problems or not digests:
        return plan, problems
    shards = tuple(_with_scales(shard, scales, digests) for shard in plan.shards)
    return replace(plan, shards=shards, recipe=_with_digests(plan.recipe, digests)), []


def _donor_of(scheme: Scheme) -> str | None:
    policy = scheme.input_scale
    return policy.location if policy is not None and policy.kind == DONOR else None


def _wanted(plan: Plan) -> dict[str, list[str]]:
    """Modules whose scale each donor has to tell."""
    found: dict[str, list[str]] = {}
    for shard in plan.shards:
        donors = {number: at for number, scheme in enumerate(shard.schemes) if (at := _donor_of(scheme)) is not None}
        unsound = {problem.tensor for problem in check_shard(shard)} if donors else set()
        for tensor in shard.tensors:
            if tensor.scheme in donors and tensor.spec.name not in unsound:
                modules = found.setdefault(donors[tensor.scheme], [])
                modules += [unit.module for unit in shard.units_of(tensor)]
    return found


def _with_scales(shard: ShardPlan, scales: Mapping[str, float], digests: Mapping[str, str]) -> ShardPlan:
    donors = {number for number, scheme in enumerate(shard.schemes) if _donor_of(scheme) is not None}
    modules = [u.module for tensor in shard.tensors if tensor.scheme in donors for u in shard.units_of(tensor)]
    own = tuple((module, scales[module]) for module in sorted(modules) if module in scales)
    return replace(shard, schemes=tuple(_resolved(s, digests) for s in shard.schemes), input_scales=own)


def _with_digests(recipe: Recipe, digests: Mapping[str, str]) -> Recipe:
    groups = tuple(replace(group, scheme=_resolved(group.scheme, digests)) for group in recipe.groups)
    return replace(recipe, groups=groups)


def _resolved(scheme: Scheme, digests: Mapping[str, str]) -> Scheme:
    policy, location = scheme.input_scale, _donor_of(scheme)
    if policy is None or location is None or location not in digests:
        return scheme
    return replace(scheme, input_scale=replace(policy, digest=digests[location]))


def _read_donor(location: str, modules: Sequence[str], intake: Intake) -> dict[str, float]:
    """The global scale of every module, as compressed-tensors has it.

    Raises:
        Refused: there is no such donor, it cannot be read, or it lacks scales; all that is wrong at once.
    """
    if not location:
        raise Refused([_problem("donor", "the recipe names a donor of input scales by digest, not where it lies")])
    folder = open_folder(location, foreign=True)
    if not folder.exists():
        raise Refused([_problem("donor", "there is no such donor of input scales", location)])
    source = SourceFolder(folder, intake)
    shards, problems = read_shards(source)
    if problems:
        raise Refused(replace(problem, file=f"{location}/{problem.file}".rstrip("/")) for problem in problems)
    entries = _find(shards, modules)
    found = [*_missing(location, modules, entries), *_misshapen(location, entries)]
    if found:
        raise Refused(found)
    scales = _read_scales(source, entries)
    if found := list(_unsound(location, scales)):
        raise Refused(found)
    return scales


def _problem(kind: str, message: str, location: str = "", tensor: str = "", way_out: str = "") -> Problem:
    way_out = way_out or "give donor:LOCATION of a calibrated NVFP4 checkpoint, or constant:V"
    return Problem(file=location, tensor=tensor, kind=kind, message=message, way_out=way_out)


def _find(shards: Iterable[SourceShard], modules: Iterable[str]) -> dict[str, _Entry]:
    """Where the scale of each module lies, as far as there is one."""
    known = {spec.name: (shard, spec) for shard in shards for spec in shard.header.tensors}
    found: dict[str, _Entry] = {}
    for module in modules:
        reciprocals, mark = (f"{module}.{param}" for param in _MODELOPT)
        if f"{module}.{PARAM}" in known:
            found[module] = _Entry(*known[f"{module}.{PARAM}"], is_reciprocal=False)
        elif reciprocals in known and mark in known:
            found[module] = _Entry(*known[reciprocals], is_reciprocal=True)
    return found


def _folded(modules: Sequence[str]) -> str:
    """Some of many names."""
    named = ", ".join(map(show, modules[:_SHOWN]))
    return f"{named} and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else named


def _missing(location: str, modules: Sequence[str], entries: Mapping[str, _Entry]) -> Iterator[Problem]:
    if lacking := [module for module in modules if module not in entries]:
        message = f"the donor has no {PARAM} for {len(lacking)} of {len(modules)} modules: {_folded(lacking)}"
        way_out = "ignore them, take another donor, or constant:V"
        yield _problem("input-scale-missing", message, location, lacking[0], way_out)


def _misshapen(location: str, entries: Mapping[str, _Entry]) -> Iterator[Problem]:
    specs = {module: entry.spec for module, entry in entries.items()}
    wrong = [module for module, spec in specs.items() if spec.dtype != "F32" or spec.shape not in ((), (1,))]
    if wrong:
        first = specs[wrong[0]]
        message = f"expected scales F32 [1], found {first.dtype} {list(first.shape)} for {len(wrong)} modules"
        yield _problem("input-scale-shape", f"{message}: {_folded(wrong)}", location, first.name)


def _unsound(location: str, scales: Mapping[str, float]) -> Iterator[Problem]:
    if wrong := [module for module, scale in scales.items() if not is_sound(scale)]:
        message = f"expected positive finite scales, found {scales[wrong[0]]} for {len(wrong)} modules"
        yield _problem("input-scale-value", f"{message}: {_folded(wrong)}", location, wrong[0])


def _read_scales(source: SourceFolder, entries: Mapping[str, _Entry]) -> dict[str, float]:
    """Read the scales, those of one shard in ascending order."""
    found: dict[str, float] = {}
    for shard in {entry.shard.name: entry.shard for entry in entries.values()}.values():
        own = [(module, entry) for module, entry in entries.items() if entry.shard is shard]
        found |= _read_shard(source, shard, sorted(own, key=lambda row: row[1].begin))
    return {module: found[module] for module in entries}


def _read_shard(source: SourceFolder, shard: SourceShard, rows: Sequence[tuple[str, _Entry]]) -> dict[str, float]:
    found: dict[str, float] = {}
    with ExitStack() as stack:
        # nothing vouches for a few bytes of a large object, so what comes over a network is read twice
        times = 2 if source.folder.traits.is_remote else 1
        readers = [stack.enter_context(source.open(shard.name)) for _ in range(times)]
        if any(reader.identity.size != shard.size for reader in readers):
            raise SourceChanged(f"{show(shard.name)} of the donor changed while it was read; run again")
        for part in _ranges(rows):
            begin, end = part[0][1].begin, part[-1][1].begin + _SCALE_BYTES
            first, *others = [_read_range(reader, begin, end) for reader in readers]
            if any(data != first for data in others):
                where = f"bytes {begin} to {end} of {show(shard.name)}"
                raise TransferDamaged(errno.EIO, f"read {where}: two reads of one state differ; run again")
            for module, entry in part:
                (value,) = struct.unpack_from("<f", first, entry.begin - begin)
                found[module] = reciprocal(value) if entry.is_reciprocal else value
    return found


def _read_range(reader: Reader, begin: int, end: int) -> bytearray:
    data = bytearray(end - begin)
    reader.read_into(begin, memoryview(data))
    return data


def _ranges(rows: Sequence[tuple[str, _Entry]]) -> Iterator[list[tuple[str, _Entry]]]:
    """Cut ascending entries into ranges without long gaps."""
    taken: list[tuple[str, _Entry]] = []
    for row in rows:
        begin = row[1].begin
        if taken and (
            begin - taken[-1][1].begin > _GAP_BYTES or begin + _SCALE_BYTES - taken[0][1].begin > RANGE_BYTES
        ):
            yield taken
            taken = []
        taken.append(row)
    if taken:
        yield taken
