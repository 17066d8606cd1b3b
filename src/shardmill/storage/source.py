"""Reading a source checkpoint: listing, index, config and every header; never a tensor byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from shardmill.core.header import LENGTH_BYTES, ShardHeader, header_length, parse_header, parse_json
from shardmill.core.index import INDEX_NAME, SINGLE_NAME, CheckpointIndex, parse_index
from shardmill.core.plan import Checkpoint, SourceShard
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
from shardmill.storage.location import open_folder

CONFIG_NAME: Final = "config.json"
_CONFIG_LIMIT: Final = 4_000_000
_INDEX_LIMIT: Final = 256_000_000
_READERS: Final = 16
_HEADER_GUESS: Final = 256 << 10
"""Bytes of a shard that are asked for first; most headers are shorter."""
_COPIED_NAMES: Final = frozenset(
    [
        "config.json",
        "generation_config.json",
        "params.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "tekken.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "preprocessor_config.json",
        "processor_config.json",
        "image_processor_config.json",
        "video_preprocessor_config.json",
        "chat_template.json",
        "chat_template.jinja",
    ]
)
_COPIED_PREFIXES: Final = ("license", "readme", "notice", "tokenizer.model.")
_COPIED_SUFFIXES: Final = (".jinja",)
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


class SourceFolder:
    """A checkpoint, wherever it lies."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

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

    def read_text(self, name: str, limit: int) -> bytes:
        """Read a small file whole.

        Raises:
            CheckpointInvalid: absent, or larger than `limit` bytes.
        """
        self._check_link(name)
        try:
            return self.folder.read(name, limit)
        except ObjectMissing as error:
            raise _missing(name) from error
        except FileTooLarge as error:
            raise refuse("file-too-large", f"larger than the limit of {limit} bytes", file=name) from error

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
            identity, start = self.folder.read_start(name, _HEADER_GUESS)
            length = header_length(start[:LENGTH_BYTES], identity.size, file=name)
            if LENGTH_BYTES + length > len(start):
                again, start = self.folder.read_start(name, LENGTH_BYTES + length)
                if again != identity:
                    raise SourceChanged(f"{show(identity.url, 200)} changed while it was read; run again")
        except ObjectMissing as error:
            raise _missing(name) from error
        data = start[LENGTH_BYTES : LENGTH_BYTES + length]
        return SourceShard(name, identity.size, parse_header(data, identity.size, file=name))

    def listing(self) -> dict[str, FileIdentity]:
        """The state of every file of the checkpoint by relative path, sorted; hidden folders are not entered."""
        found = self.folder.listing()
        return {name: state for name, state in found.items() if not any(map(_is_hidden, name.split("/")[:-1]))}

    def names(self) -> tuple[str, ...]:
        """Every file of the checkpoint as a relative path, sorted; hidden folders are not entered."""
        return tuple(self.listing())


def _is_hidden(part: str) -> bool:
    return part.startswith(".")


def _missing(name: str) -> CheckpointInvalid:
    return refuse("file-missing", "file is missing", file=name, way_out="fetch it again")


def open_source(url: str) -> SourceFolder:
    """Open a source by path or URL.

    Raises:
        CheckpointInvalid: no such folder, or no such kind of location.
    """
    folder = open_folder(url)
    if not folder.exists():
        raise refuse("source-missing", "expected a folder with safetensors shards, config.json and tokenizer", file=url)
    return SourceFolder(folder)


def read_checkpoint(source: SourceFolder, names: Sequence[str] | None = None) -> Checkpoint:
    """Read everything a plan needs; what is wrong is collected in the result, not raised.

    Args:
        names: of its files, where they are known already.
    """
    problems: list[Problem] = []
    warnings: list[Problem] = []
    names = source.names() if names is None else names
    index = _read_index(source, names, problems)
    shard_names = _choose_shards(names, index, problems)
    shards = _read_headers(source, shard_names, problems)
    copied, left_out = _sort_other_files(names, shard_names)
    for name, reason in left_out:
        if name.endswith(".safetensors"):
            warnings.append(Problem(file=name, kind="weight-file-left-out", message=reason))
    return Checkpoint(
        shards=shards,
        index=index,
        config_text=_read_config(source, problems),
        files=_regular(source, copied, problems),
        left_out=left_out,
        problems=tuple(problems),
        warnings=(*warnings, *_unindexed(shards, index)),
    )


def _read_index(source: SourceFolder, names: Iterable[str], problems: list[Problem]) -> CheckpointIndex | None:
    if INDEX_NAME not in names:
        return None
    try:
        return parse_index(source.read_text(INDEX_NAME, _INDEX_LIMIT))
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
    message = f"expected {SINGLE_NAME} or {INDEX_NAME}, found {len(found)} safetensors files without an index"
    problems.append(Problem(kind="index-missing", message=message, way_out="point to a safetensors checkpoint"))
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


def _read_config(source: SourceFolder, problems: list[Problem]) -> str:
    try:
        data = source.read_text(CONFIG_NAME, _CONFIG_LIMIT)
        if not isinstance(parse_json(data, file=CONFIG_NAME, kind="config-invalid"), Mapping):
            raise refuse("config-invalid", "expected a JSON object", file=CONFIG_NAME)
    except CheckpointInvalid as error:
        problems += error.problems
        return ""
    return data.decode("utf-8-sig")


def _sort_other_files(
    names: Iterable[str], shards: Iterable[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What is copied, by allow-list, and what is left out and why."""
    copied: list[str] = []
    left_out: list[tuple[str, str]] = []
    apart = {*shards, INDEX_NAME, CONFIG_NAME}
    for name in names:
        if name in apart:
            continue
        base = name.rpartition("/")[2].lower()
        if base.endswith(_WEIGHT_SUFFIXES) or ".safetensors." in base:
            left_out.append((name, "a weight file that the index does not name"))
        elif base in _COPIED_NAMES or base.startswith(_COPIED_PREFIXES) or base.endswith(_COPIED_SUFFIXES):
            copied.append(name)
        else:
            left_out.append((name, "not on the list of files that are copied"))
    return tuple(copied), tuple(left_out)


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
