"""Make one tensor of a finished result again, from its source, and compare the bytes.

Nothing is taken on trust but the recipe in the manifest: the plan is made anew from the headers of the source, the
digests of the shards that are read are compared with those in the manifest, and the job must be the one whose result
the manifest names. Then the ordinary kernels compute the tensor, with the extent of its fused partners.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Final

from shardmill.core.assemble import MANIFEST_NAME
from shardmill.core.digest import Digest
from shardmill.core.groups import LAYOUT_VERSION
from shardmill.core.header import TensorSpec
from shardmill.core.input_scale import DONOR
from shardmill.core.layout import Placed
from shardmill.core.manifest import Manifest
from shardmill.core.nonfinite import Kept
from shardmill.core.plan import COPY, Plan, ShardPlan, TensorPlan
from shardmill.core.recipe import Recipe
from shardmill.core.scheme import Scheme
from shardmill.core.written import Located
from shardmill.errors import CheckpointInvalid, Problem, Refused, refuse, show
from shardmill.kernels.threads import cores
from shardmill.stages.devices import limit_threads
from shardmill.stages.plan import make_plan
from shardmill.stages.result import INTAKE, Readers, VerifyWatch, read_manifest
from shardmill.storage.folder import Reader
from shardmill.storage.hashing import digest_file
from shardmill.storage.source import SourceFolder, open_source

_ALGORITHMS: Final = ("blake3", "sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """A tensor that was made again."""

    tensor: str
    """Of the source."""
    shard: str
    outputs: tuple[str, ...]
    """What it becomes in the result."""
    nbytes: int
    """Of the outputs together."""
    read: tuple[str, ...]
    """Source shards whose digests were compared."""


def reproduce(
    destination: str, source: str, tensor: str, watch: VerifyWatch | None = None
) -> tuple[Reproduction, list[Problem]]:
    """Make a tensor again and compare it with the result; a problem is an output that is missing or has other bytes.

    Args:
        tensor: name of a tensor of the source or of the result, or of a module. All that its source tensor becomes is
            compared: of a stack of experts, every expert.

    Raises:
        CheckpointInvalid: there is no manifest, no such tensor (`tensor-unknown`), or the source is not the one of the
            result (`source-differs`).
        Refused: this version does another job than the one that made the result (`version-differs`), or cannot make
            a plan of the source.
        NonFiniteWeight: NaN or Inf in the weight.
        SourceChanged: a file changed meanwhile.
    """
    told = watch or VerifyWatch()
    folder, origin = open_source(destination, INTAKE), open_source(source, INTAKE)
    manifest = read_manifest(folder)
    shard, planned = _find(_plan(origin, manifest, destination), tensor)
    versions = _versions(manifest)
    if versions:
        told.on_note(versions)
    _check_sources(manifest, shard, origin, told)
    _check_job(manifest, shard, versions)
    alone = replace(shard, tensors=(planned,))
    layout = alone.layout()
    written = folder.read_header(shard.name)
    stored = {spec.name: Located(shard.name, written.header.data_start, spec) for spec in written.header.tensors}
    problems = _check_specs(layout.placed, stored, shard.name)
    found = Reproduction(
        tensor=planned.spec.name,
        shard=shard.name,
        outputs=tuple(placed.spec.name for placed in layout.placed),
        nbytes=layout.data_bytes,
        read=alone.sources,
    )
    if not problems:
        problems = _compute(alone, origin, folder, stored)
    return found, sorted(problems)


def _plan(origin: SourceFolder, manifest: Manifest, destination: str) -> Plan:
    """The plan of the result: what was copied because of its values is copied again.

    Input scales of a donor, whose place no manifest tells, are those of the result itself, if they have the digest of
    those that were taken.
    """
    recipe = _donated(manifest.recipe, destination)
    plan = make_plan(origin, recipe)
    if manifest.recipe.allow_nonfinite:
        said = {t.name: t for shard in manifest.shards for t in shard.tensors if t.action == COPY}
        kept = {
            tensor.spec.name: said[tensor.spec.name].reason
            for shard in plan.shards
            for tensor in shard.tensors
            if tensor.action != COPY and tensor.spec.name in said
        }
        plan = make_plan(origin, recipe, Kept(reasons=kept, warnings=()))
    if plan.problems:
        raise Refused(plan.problems)
    if plan.recipe != manifest.recipe:
        message = "its input scales are not those that were taken of the donor"
        way_out = "fetch the result again"
        raise refuse("input-scale-differs", message, file=MANIFEST_NAME, way_out=way_out)
    return plan


def _donated(recipe: Recipe, donor: str) -> Recipe:
    """The recipe with this donor in place of one whose location is not told."""

    def given(scheme: Scheme) -> Scheme:
        policy = scheme.input_scale
        if policy is None or policy.kind != DONOR:
            return scheme
        return replace(scheme, input_scale=replace(policy, location=donor))

    return replace(recipe, groups=tuple(replace(group, scheme=given(group.scheme)) for group in recipe.groups))


def _find(plan: Plan, name: str) -> tuple[ShardPlan, TensorPlan]:
    for shard in plan.shards:
        for tensor in shard.tensors:
            if tensor.spec.name == name:
                return shard, tensor
    for shard in plan.shards:
        for tensor in shard.tensors:
            for unit in shard.units_of(tensor):
                if name == unit.module or name in [spec.name for spec in unit.outputs]:
                    return shard, tensor
    names = [tensor.spec.name for shard in plan.shards for tensor in shard.tensors]
    close = difflib.get_close_matches(name, names, 1, 0.8)
    way_out = f"did you mean {show(close[0])}?" if close else "give the name of a tensor or module"
    raise refuse("tensor-unknown", "neither source nor result has such a tensor", tensor=name, way_out=way_out)


def _versions(manifest: Manifest) -> str:
    """How the versions that made the result differ from these; empty where they do not."""
    here = {"shardmill": version("shardmill"), "compressed-tensors layout": LAYOUT_VERSION}
    made = dict(manifest.versions)
    differing = [
        f"{name} {show(made.get(name, 'unknown'))[1:-1]} made the result, {here[name]} is used here"
        for name in here
        if made.get(name) != here[name]
    ]
    return "; ".join(differing)


def _check_sources(manifest: Manifest, shard: ShardPlan, origin: SourceFolder, told: VerifyWatch) -> None:
    """The shards that are read have the digests in the manifest."""
    expected = dict(manifest.sources)
    told.on_total(sum(origin.identity(name).size for name in shard.sources))
    problems = []
    for name in shard.sources:
        found = _differs(expected.get(name), name, origin)
        told.on_bytes(origin.identity(name).size)
        if found:
            way_out = "give the source that the result was made of"
            problems.append(Problem(file=name, kind="source-differs", message=found, way_out=way_out))
    if problems:
        raise CheckpointInvalid(problems)


def _differs(expected: Digest | None, name: str, origin: SourceFolder) -> str:
    if expected is None:
        return "the manifest has no digest of it"
    if expected.algorithm not in _ALGORITHMS:
        return f"the manifest has no digest of its content, only {show(expected.algorithm)}"
    known = origin.identity(name).digest
    is_known = known is not None and known.algorithm == expected.algorithm
    found = known if is_known and known is not None else digest_file(origin.folder, name, expected.algorithm)
    if found == expected:
        return ""
    return f"expected {expected.algorithm} {expected.value[:16]}…, found {found.value[:16]}…"


def _check_job(manifest: Manifest, shard: ShardPlan, versions: str) -> None:
    """The job is the one whose result the manifest names: same decisions, layout, sources and stage version."""
    key = shard.job_key(manifest.source_digests)
    made = {entry.name: entry.key for entry in manifest.shards}.get(shard.name, "none")
    if key != made:
        message = f"expected the job {show(made[:16])} that made it, this version does {show(key[:16])}"
        way_out = f"use the version that made it: {versions}" if versions else "fetch the manifest again"
        raise Refused([Problem(file=shard.name, kind="version-differs", message=message, way_out=way_out)])


def _check_specs(placed: tuple[Placed, ...], stored: Mapping[str, Located], shard: str) -> list[Problem]:
    problems = []
    for spec in (entry.spec for entry in placed):
        located = stored.get(spec.name)
        if located is None:
            problems.append(Problem(file=shard, tensor=spec.name, kind="tensor-missing", message="not in the result"))
        elif (located.spec.dtype, located.spec.shape) != (spec.dtype, spec.shape):
            found: TensorSpec = located.spec
            message = f"expected {spec.dtype} {list(spec.shape)}, found {found.dtype} {list(found.shape)}"
            problems.append(Problem(file=shard, tensor=spec.name, kind="shape-differs", message=message))
    return problems


@dataclass(slots=True, kw_only=True)
class _Differences:
    """Takes the data section of the shard that holds this tensor alone, and compares it range by range."""

    placed: tuple[Placed, ...]
    stored: Mapping[str, Located]
    written: Readers
    problems: dict[str, Problem] = field(default_factory=dict)
    """The first difference of each output, by name."""
    _position: int = 0
    _current: int = 0

    def write(self, view: memoryview) -> None:
        """Compare the next bytes."""
        while len(view):
            entry = self.placed[self._current]
            if self._position == entry.end:
                self._current += 1
                continue
            part = view[: entry.end - self._position]
            self._compare(entry, part)
            self._position += len(part)
            view = view[len(part) :]

    def _compare(self, entry: Placed, part: memoryview) -> None:
        located, begin = self.stored[entry.spec.name], self._position - entry.begin
        found = self.written.read(located.shard, located.data_start + located.spec.begin + begin, len(part))
        if found != part and entry.spec.name not in self.problems:
            first = next(n for n, pair in enumerate(zip(found, part, strict=True)) if pair[0] != pair[1])
            message = f"expected the bytes that its source gives, found others from byte {begin + first} on"
            self.problems[entry.spec.name] = Problem(
                file=located.shard, tensor=entry.spec.name, kind="bytes-differ", message=message
            )


def _compute(
    alone: ShardPlan, origin: SourceFolder, folder: SourceFolder, stored: Mapping[str, Located]
) -> list[Problem]:
    from shardmill.kernels.lanes import needs_torch  # kernels take long to import
    from shardmill.kernels.shard import encode_shard

    if needs_torch(alone, "cpu"):
        limit_threads(["cpu"] * cores())
    layout = alone.layout()
    with ExitStack() as stack:
        readers: dict[str, Reader] = {name: stack.enter_context(origin.open(name)) for name in alone.sources}
        found = _Differences(placed=layout.placed, stored=stored, written=Readers(folder, stack))

        def read(name: str, offset: int, view: memoryview) -> None:
            readers[name].read_into(offset, view)

        encode_shard(alone, read, found.write, layout=layout)
    return list(found.problems.values())
