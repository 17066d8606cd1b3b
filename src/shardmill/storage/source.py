"""Reading a source checkpoint: listing, index, config and every header; never a tensor byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

from shardmill.core.assemble import PARAMS_NAME
from shardmill.core.foreign import code_removed, is_config, names_code, sort_files, without_code
from shardmill.core.header import LENGTH_BYTES, ShardHeader, header_length, parse_header
from shardmill.core.index import INDEX_NAME, SINGLE_NAME, CheckpointIndex, choose_index, is_index_name, parse_index
from shardmill.core.limits import Intake, refuse_above
from shardmill.core.plan import Checkpoint, SourceShard
from shardmill.core.strict_json import parse_json
from shardmill.errors import (
    CheckpointInvalid,
    FileTooLarge,
    ObjectMissing,
    Problem,
    Refused,
    SourceChanged,
    refuse,
    show,
)
from shardmill.storage.folder import FileIdentity, Folder, Reader
from shardmill.storage.guard import Oddities, survey
from shardmill.storage.location import open_folder

CONFIG_NAME: Final = "config.json"
_READERS: Final = 16
_HEADER_GUESS: Final = 256 << 10
"""Bytes of a shard that are asked for first; most headers are shorter."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What lies in a folder, as far as names tell."""

    files: dict[str, FileIdentity]
    """State by relative path, sorted; those in hidden folders left out."""
    hidden: tuple[str, ...]
    """Hidden folders."""


class SourceFolder:
    """A checkpoint, wherever it lies, and what of it is taken in."""

    def __init__(self, folder: Folder, intake: Intake | None = None) -> None:
        self.folder = folder
        self.intake = intake or Intake()

    def check(self, name: str) -> None:
        """Make sure that a file can be read.

        Raises:
            CheckpointInvalid: absent, no regular file, or it leads out of the checkpoint.
        """
        self.folder.check(name)

    def _check_link(self, name: str) -> None:
        """Check a name where there are links and special files; elsewhere the next request tells all."""
        if self.folder.path is not None:
            self.check(name)

    def identity(self, name: str) -> FileIdentity:
        """The state of a file.

        Raises:
            CheckpointInvalid: absent, no regular file, or it leads out of the checkpoint.
        """
        self._check_link(name)
        found = self.folder.identity(name)
        if found is None:
            raise _missing(name)
        return found

    def read_text(self, name: str, limit: str | int) -> bytes:
        """Read a small file whole.

        Args:
            limit: the name of one, or a number of bytes.

        Raises:
            CheckpointInvalid: absent, or larger than the limit.
        """
        most = getattr(self.intake.limits, limit) if isinstance(limit, str) else limit
        self._check_link(name)
        try:
            return self.folder.read(name, most)
        except ObjectMissing as error:
            raise _missing(name) from error
        except FileTooLarge as error:
            if isinstance(limit, str):
                raise refuse_above(limit, "file too large", self.intake.limits, file=name) from error
            raise refuse("file-too-large", f"larger than the limit of {most} bytes", file=name) from error

    def open(self, name: str) -> Reader:
        """Open a file for range reads.

        Raises:
            CheckpointInvalid: absent, no regular file, or it leads out of the checkpoint.
        """
        self._check_link(name)
        try:
            return self.folder.open(name)
        except ObjectMissing as error:
            raise _missing(name) from error

    def read_header(self, name: str) -> SourceShard:
        """Read the header of one shard, mostly in one request.

        Raises:
            CheckpointInvalid: absent, truncated or malformed.
        """
        self._check_link(name)
        try:
            limits = self.intake.limits
            identity, start = self.folder.read_start(name, _HEADER_GUESS)
            length = header_length(start[:LENGTH_BYTES], identity.size, file=name, limits=limits)
            if LENGTH_BYTES + length > len(start):
                again, start = self.folder.read_start(name, LENGTH_BYTES + length)
                if again != identity:
                    raise SourceChanged(f"{show(identity.url, 200)} changed while it was read; run again")
        except ObjectMissing as error:
            raise _missing(name) from error
        data = start[LENGTH_BYTES : LENGTH_BYTES + length]
        return SourceShard(name, identity.size, parse_header(data, identity.size, file=name, limits=limits))

    def survey(self) -> Survey:
        """Look at every file of the checkpoint; hidden folders are not entered."""
        files: dict[str, FileIdentity] = {}
        hidden: set[str] = set()
        for name, state in self.folder.listing().items():
            parts = name.split("/")[:-1]
            at = next((n for n, part in enumerate(parts) if _is_hidden(part)), None)
            if at is None:
                files[name] = state
            else:
                hidden.add("/".join(parts[: at + 1]))
        return Survey(files, tuple(sorted(hidden)))

    def listing(self) -> dict[str, FileIdentity]:
        """The state of every file of the checkpoint by relative path, sorted; hidden folders are not entered."""
        return self.survey().files

    def names(self) -> tuple[str, ...]:
        """Every file of the checkpoint as a relative path, sorted; hidden folders are not entered."""
        return tuple(self.listing())

    def oddities(self) -> Oddities:
        """What is neither a plain file nor a plain folder; only disks have such things."""
        return Oddities() if self.folder.path is None else survey(self.folder.path)


def _is_hidden(part: str) -> bool:
    return part.startswith(".")


def _missing(name: str) -> CheckpointInvalid:
    return refuse("file-missing", "file is missing", file=name, way_out="fetch it again")


def open_source(url: str, intake: Intake | None = None) -> SourceFolder:
    """Open a source by path or URL.

    Raises:
        CheckpointInvalid: no such folder, or no such kind of location.
    """
    folder = open_folder(url, foreign=True)
    if not folder.exists():
        raise refuse("source-missing", "expected a folder with safetensors shards, config.json and tokenizer", file=url)
    return SourceFolder(folder, intake)


def read_shards(source: SourceFolder) -> tuple[tuple[SourceShard, ...], tuple[Problem, ...]]:
    """Read the headers of all shards of a folder that need be no whole checkpoint, and what is wrong with them."""
    problems: list[Problem] = []
    files = source.listing()
    shards = _read_headers(source, _choose_shards(files, _read_index(source, files, problems), problems), problems)
    return shards, tuple(problems)


def read_checkpoint(source: SourceFolder, found: Survey | None = None) -> Checkpoint:
    """Read everything a plan needs; what is wrong is collected in the result, not raised.

    Args:
        found: what lies there, where that is known already.
    """
    problems: list[Problem] = []
    seen = source.survey() if found is None else found
    odd = source.oddities()
    index = _read_index(source, seen.files, problems)
    shard_names = _choose_shards(seen.files, index, problems)
    shards = _read_headers(source, shard_names, problems)
    apart = {*shard_names, choose_index(seen.files), CONFIG_NAME}
    others = sort_files(
        [name for name in seen.files if name not in apart],
        odd=odd.files,
        hidden=sorted({*seen.hidden, *odd.hidden}),
        allow_code=source.intake.allow_code,
    )
    config_text, rewritten, references = _read_configs(source, others.copied, problems)
    files = _regular(source, [name for name in others.copied if name not in dict(rewritten)], problems)
    return Checkpoint(
        shards=shards,
        index=index,
        config_text=config_text,
        files=files,
        left_out=others.left_out,
        rewritten=rewritten,
        problems=(*problems, *_links_out(odd)),
        warnings=(*others.warnings, *references, *_links_in(odd), *_long_metadata(shards), *_unindexed(shards, index)),
        intake=source.intake,
    )


def _links_out(odd: Oddities) -> list[Problem]:
    message = "a folder that is a link out of the checkpoint"
    way_out = "replace the link by what it leads to"
    return [Problem(file=n, kind="folder-outside", message=message, way_out=way_out) for n in odd.folders_out]


def _links_in(odd: Oddities) -> list[Problem]:
    message = "a folder that is a link; it is not entered"
    return [Problem(file=name, kind="folder-link", message=message) for name in odd.folders_in]


def _long_metadata(shards: Iterable[SourceShard]) -> list[Problem]:
    return [
        Problem(
            file=shard.name,
            kind="metadata-passed-over",
            message=f"`__metadata__` of {shard.header.passed_over} bytes is above the limit `metadata_bytes`; not read",
        )
        for shard in shards
        if shard.header.passed_over
    ]


def _read_index(source: SourceFolder, names: Iterable[str], problems: list[Problem]) -> CheckpointIndex | None:
    name = choose_index(names)
    if name is None:
        return None
    try:
        return parse_index(source.read_text(name, "index_bytes"), file=name, limits=source.intake.limits)
    except Refused as error:
        problems += error.problems
        return None


def _choose_shards(names: Iterable[str], index: CheckpointIndex | None, problems: list[Problem]) -> tuple[str, ...]:
    if index is not None:
        return index.shards
    found = tuple(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if SINGLE_NAME in found:
        return (SINGLE_NAME,)
    if len(found) == 1 or any(problem.kind.startswith("index") for problem in problems):
        return found[:1] if len(found) == 1 else ()
    indexes = sorted(filter(is_index_name, names))
    what = f"{len(indexes)} indexes, such as {show(indexes[0])}" if indexes else "no index"
    message = f"expected {SINGLE_NAME} or {INDEX_NAME}, found {len(found)} safetensors files and {what}"
    way_out = f"name one of them {INDEX_NAME}" if indexes else "point to a safetensors checkpoint"
    problems.append(Problem(kind="index-missing", message=message, way_out=way_out))
    return ()


def _read_headers(source: SourceFolder, names: Iterable[str], problems: list[Problem]) -> tuple[SourceShard, ...]:
    def read(name: str) -> SourceShard | CheckpointInvalid:
        try:
            return source.read_header(name)
        except CheckpointInvalid as error:
            return error

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(read, names))
    for result in found:
        if isinstance(result, CheckpointInvalid):
            problems += result.problems
    return tuple(result for result in found if isinstance(result, SourceShard))


def _read_configs(
    source: SourceFolder, copied: Iterable[str], problems: list[Problem]
) -> tuple[str, tuple[tuple[str, str], ...], list[Problem]]:
    """Text of config.json, other configs that are written anew, and a warning for each that refers to code."""
    others = [name for name in copied if is_config(name) or name == PARAMS_NAME]
    with ThreadPoolExecutor(_READERS) as pool:
        reads = pool.map(lambda name: _read_config(source, name), [CONFIG_NAME, *others])
        config, *found = list(reads)
    rewritten: list[tuple[str, str]] = []
    warnings: list[Problem] = []
    text = ""
    for name, result in zip([CONFIG_NAME, *others], [config, *found], strict=True):
        if isinstance(result, CheckpointInvalid):
            problems += _config_beside_params(result) if PARAMS_NAME in others else result.problems
            continue
        document, raw = result
        text = raw if name == CONFIG_NAME else text
        if name == PARAMS_NAME:
            rewritten.append((name, raw))  # the plan puts its scheme into it
        elif names_code(document):
            warnings.append(code_removed(name, is_kept=source.intake.allow_code))
            if name != CONFIG_NAME and not source.intake.allow_code:
                rewritten.append((name, without_code(document)))
    return text, tuple(rewritten), warnings


def _config_beside_params(error: CheckpointInvalid) -> list[Problem]:
    """The problems of a config that is missing where Mistral's own is there, which says less."""
    way_out = f"take it from the model's other format: {PARAMS_NAME} alone does not tell the architecture"
    return [replace(p, way_out=way_out) if p.kind == "file-missing" else p for p in error.problems]


def _read_config(source: SourceFolder, name: str) -> tuple[Any, str] | CheckpointInvalid:
    """A config as a value and as text."""
    try:
        data = source.read_text(name, "json_bytes")
        document = parse_json(data, file=name, kind="config-invalid", limits=source.intake.limits)
        if not isinstance(document, Mapping):
            raise refuse("config-invalid", "expected a JSON object", file=name)
    except CheckpointInvalid as error:
        return error
    return document, data.decode("utf-8")


def _regular(source: SourceFolder, names: Iterable[str], problems: list[Problem]) -> tuple[str, ...]:
    found = []
    for name in names:
        try:
            source.check(name)
        except CheckpointInvalid as error:
            problems += error.problems
        else:
            found.append(name)
    return tuple(found)


def _unindexed(shards: Iterable[SourceShard], index: CheckpointIndex | None) -> list[Problem]:
    if index is None:
        return []
    return [
        Problem(
            file=shard.name,
            tensor=spec.name,
            kind="tensor-unindexed",
            message="the index does not name it; it is carried over",
        )
        for shard in shards
        if None in map(index.weight_map.get, [spec.name for spec in shard.header.tensors])
        for spec in shard.header.tensors
        if spec.name not in index.weight_map
    ]


def same_header(planned: Iterable[object], header: ShardHeader) -> bool:
    """Tell whether a header still lists exactly the planned tensors."""
    return tuple(planned) == header.tensors
