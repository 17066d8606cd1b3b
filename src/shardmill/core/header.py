"""safetensors headers: a strict parser and a deterministic encoder.

The library's own reader lets duplicate keys and unknown fields pass; this one does not. `parse_header` returns a valid
value or raises `CheckpointInvalid`; nothing later checks again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any, Final, NamedTuple

from shardmill.core.dtypes import BITS, size_in_bytes
from shardmill.core.limits import DEFAULTS, Limits, above, refuse_above
from shardmill.core.strict_json import parse_json
from shardmill.errors import CheckpointInvalid, Problem, refuse, show

LENGTH_BYTES: Final = 8
"""Bytes of the little-endian header length that opens every shard."""
ALIGNMENT: Final = 8
WRITTEN_METADATA: Final = (("format", "pt"),)
"""Loaders look for `format: pt`."""


class TensorSpec(NamedTuple):
    """One tensor of a shard; a named tuple, since a checkpoint may have a million of them.

    >>> TensorSpec("w", "BF16", (2, 3), 0, 12).nbytes
    12
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the data section."""
    end: int
    """First byte after the tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The parsed header of one shard; tensors in order of their data."""

    tensors: tuple[TensorSpec, ...]
    metadata: tuple[tuple[str, str], ...]
    data_start: int
    """Offset of the data section in the file, in bytes."""
    passed_over: int = 0
    """Bytes of `__metadata__` that were not parsed because they are above the limit."""

    @property
    def size(self) -> int:
        """Exact size of the file in bytes."""
        return self.data_start + max((t.end for t in self.tensors), default=0)


def header_length(head: bytes, file_size: int, *, file: str = "", limits: Limits = DEFAULTS) -> int:
    """Read the header's length from the first 8 bytes of a shard.

    Raises:
        CheckpointInvalid: the file is too short or the length is impossible.

    >>> header_length((16).to_bytes(8, "little"), 100)
    16
    """
    if len(head) < LENGTH_BYTES:
        raise refuse("shard-truncated", f"expected a safetensors file, found {file_size} bytes", file=file)
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if limits.header_bytes < length <= file_size - LENGTH_BYTES:
        raise refuse_above("header_bytes", f"header of {length} bytes", limits, file=file)
    if length < 2 or LENGTH_BYTES + length > file_size:
        raise refuse(
            "shard-truncated",
            f"header says {length} bytes, the file has {file_size}",
            file=file,
            way_out="fetch the file again",
        )
    return length


def parse_header(data: bytes, file_size: int, *, file: str = "", limits: Limits = DEFAULTS) -> ShardHeader:
    """Parse the JSON head of a shard of `file_size` bytes; `data` holds the JSON without its length.

    The law: tensors cover the data section exactly, with no hole, no overlap and nothing after. A header in the plain
    form that writers give it is read by one expression; any other goes through the JSON parser.

    Raises:
        CheckpointInvalid: with every defect of the header, or with the limit that it exceeds.

    >>> parse_header(b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', 63).tensors[0].shape
    (2,)
    """
    if len(data) > limits.header_bytes:
        raise refuse_above("header_bytes", f"header of {len(data)} bytes", limits, file=file)
    tensors = data.count(b'"data_offsets"')
    if tensors > limits.header_tensors:
        raise refuse_above("header_tensors", f"{tensors} tensors in one header", limits, file=file)
    text, passed_over = _without_long_metadata(data, limits.metadata_bytes)
    start = LENGTH_BYTES + len(data)
    header = _parse_plain(text, file_size, start, limits) or _parse_any(text, file_size, file, start, limits)
    return header if not passed_over else replace(header, passed_over=passed_over)


_TEXT: Final = rb'"(?:[^"\\]++|\\.)*+"'
_METADATA: Final = re.compile(
    rb'"__metadata__"\s*+:\s*+(\{\s*+(?:%b\s*+:\s*+%b\s*+(?:,\s*+|(?=\})))*+\})' % (_TEXT, _TEXT), re.DOTALL
)
"""Strings that map to strings; possessive, so that it takes linear time."""


def _without_long_metadata(data: bytes, limit: int) -> tuple[bytes, int]:
    """The text with an empty `__metadata__` where that is longer than the limit, and how long it was then.

    It is dropped in any case. What is cut out of anything but the metadata leaves an entry that is refused.
    """
    found = _METADATA.search(data) if len(data) > limit else None
    if found is None or found.end(1) - found.start(1) <= limit:
        return data, 0
    return data[: found.start(1)] + b"{}" + data[found.end(1) :], found.end(1) - found.start(1)


_PLAIN_HEAD: Final = re.compile(r'\{ ?(?:"__metadata__": ?(\{[^{}]*\}), ?)?')
_PLAIN_ENTRY: Final = re.compile(
    r'("([ !#-\[\]-~]{1,4096})": ?\{("dtype": ?"[A-Z0-9_]+", ?"shape": ?\[[0-9, ]{0,200}\]), ?'
    r'"data_offsets": ?\[(0|[1-9][0-9]{0,17}), ?(0|[1-9][0-9]{0,17})\]\}(?:, ?|\} *\Z))'
)
"""Groups: the whole entry, name, dtype and shape, begin, end. Names are printable ASCII without escapes."""


def _parse_plain(data: bytes, file_size: int, start: int = 0, limits: Limits = DEFAULTS) -> ShardHeader | None:
    """Read a sound header in plain form; None for any other, about which `_parse_any` has the say.

    Entries that tile the text to its end, with names that differ, leave JSON nothing to object to.
    """
    if not data.isascii():
        return None
    text = data.decode("ascii")
    head = _PLAIN_HEAD.match(text)
    if head is None or not text.rstrip(" ").endswith("}}"):
        return None
    rows = _PLAIN_ENTRY.findall(text, head.end())
    names = {row[1] for row in rows}
    is_tiled = sum([len(row[0]) for row in rows]) == len(text) - head.end()
    if not is_tiled or len(names) != len(rows) or "__metadata__" in names:
        return None
    metadata = _plain_metadata(head[1])
    specs = _plain_specs(rows, limits.rank)
    if metadata is None or specs is None or max(map(len, names), default=0) > limits.name_bytes:
        return None
    header = ShardHeader(specs, metadata, start or LENGTH_BYTES + len(data))
    return None if _check_extent(header, file_size, "") else header


def _plain_metadata(text: str | None) -> tuple[tuple[str, str], ...] | None:
    problems: list[Problem] = []
    try:
        found = _parse_metadata(parse_json((text or "{}").encode(), file="", kind=""), "", problems)
    except CheckpointInvalid:
        return None
    return None if problems else found


def _plain_specs(rows: Sequence[tuple[str, str, str, str, str]], rank: int) -> tuple[TensorSpec, ...] | None:
    """Turn matched entries into specs in order of their data; None when one of them is unsound."""
    specs: list[TensorSpec] = []
    reached, reached_text, is_sorted = 0, "0", True
    for _, name, kind, begin_text, end_text in rows:
        dtype, shape, nbytes = _plain_kind(kind, rank)
        begin = reached if begin_text == reached_text else int(begin_text)
        end = int(end_text)
        if nbytes != end - begin:
            return None
        is_sorted = is_sorted and begin == reached and nbytes > 0
        reached, reached_text = end, end_text
        specs.append(TensorSpec(name, dtype, shape, begin, end))
    if not is_sorted:
        specs.sort(key=_data_order)
    return tuple(specs)


@lru_cache(maxsize=4096)
def _plain_kind(text: str, rank: int) -> tuple[str, tuple[int, ...], int | None]:
    """Dtype, shape and bytes of an entry's `"dtype":…,"shape":…`; None for bytes when it is unsound."""
    try:
        kind = json.loads(f"{{{text}}}")
    except ValueError:
        return "", (), None
    dtype, shape = kind["dtype"], tuple(kind["shape"])
    is_sound = dtype in BITS and len(shape) <= rank and all(map(_is_count, shape))
    return dtype, shape, size_in_bytes(dtype, shape) if is_sound else None


def _data_order(spec: TensorSpec) -> tuple[int, int, str]:
    return spec.begin, spec.end, spec.name


_VALUES_PER_TENSOR: Final = 16
"""Commas and brackets of an entry, up to ten dimensions and more than usual."""


def _parse_any(data: bytes, file_size: int, file: str, start: int = 0, limits: Limits = DEFAULTS) -> ShardHeader:
    if not data.startswith(b"{"):
        raise refuse("header-invalid", "header does not start with `{`", file=file)
    most = ("header_tensors", _VALUES_PER_TENSOR * limits.header_tensors, limits.header_tensors + 2)
    raw = parse_json(data, file=file, kind="header-invalid", limits=limits, most=most)
    if not isinstance(raw, dict):
        raise refuse("header-invalid", "header is no JSON object", file=file)
    problems: list[Problem] = []
    metadata = _parse_metadata(raw.pop("__metadata__", {}), file, problems)
    if len(raw) > limits.header_tensors:
        raise refuse_above("header_tensors", f"{len(raw)} tensors in one header", limits, file=file)
    specs = [spec for name, entry in raw.items() if (spec := _parse_entry(name, entry, file, problems, limits))]
    specs.sort(key=_data_order)
    header = ShardHeader(tuple(specs), metadata, start or LENGTH_BYTES + len(data))
    if not problems:
        problems = _check_extent(header, file_size, file)
    if problems:
        raise CheckpointInvalid(problems)
    return header


def _parse_metadata(raw: Any, file: str, problems: list[Problem]) -> tuple[tuple[str, str], ...]:
    if isinstance(raw, dict) and all(isinstance(value, str) for value in raw.values()):
        return tuple(sorted(raw.items()))
    problems.append(Problem(file=file, kind="header-invalid", message="`__metadata__` must map strings to strings"))
    return ()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_name(name: str, file: str, limits: Limits) -> Problem | None:
    if len(name.encode("utf-8", "surrogatepass")) > limits.name_bytes:
        return above("name_bytes", "tensor name too long", limits, file=file, tensor=name)
    if name and name.isprintable():
        return None
    defect = "tensor name holds control or invisible characters" if name else "a tensor has an empty name"
    return Problem(file=file, tensor=name, kind="header-invalid", message=defect)


def _entry_defect(entry: Any) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "expected exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"unknown dtype {show(str(dtype)[:200])}"
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        return "shape must be a list of non-negative integers"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        return "data_offsets must be two non-negative integers"
    return None


def _check_entry(name: str, entry: Any, file: str, limits: Limits) -> Problem | None:
    defect = _entry_defect(entry)
    if defect is None:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if len(shape) > limits.rank:
            return above("rank", f"{len(shape)} dimensions", limits, file=file, tensor=name)
        expected = size_in_bytes(dtype, tuple(shape))
        if expected == end - begin:
            return None
        defect = f"{dtype} {shape} takes {expected} bytes, data_offsets span {end - begin}"
    return Problem(file=file, tensor=name, kind="header-invalid", message=defect)


def _parse_entry(name: str, entry: Any, file: str, problems: list[Problem], limits: Limits) -> TensorSpec | None:
    problem = _check_name(name, file, limits) or _check_entry(name, entry, file, limits)
    if problem is not None:
        problems.append(problem)
        return None
    begin, end = entry["data_offsets"]
    return TensorSpec(name, entry["dtype"], tuple(entry["shape"]), begin, end)


def _check_extent(header: ShardHeader, file_size: int, file: str) -> list[Problem]:
    problems: list[Problem] = []
    reached = 0
    for name, _, _, begin, end in header.tensors:
        if begin not in (reached, end):
            word = "overlap" if begin < reached else "hole"
            message = f"{word} in the data section: byte {reached} expected, data_offsets begin at {begin}"
            problems.append(Problem(file=file, tensor=name, kind="header-invalid", message=message))
        reached = max(reached, end)
    if header.data_start + reached != file_size:
        message = f"expected {header.data_start + reached} bytes by its header, found {file_size}"
        kind = "shard-truncated" if header.data_start + reached > file_size else "shard-too-long"
        problems.append(Problem(file=file, kind=kind, message=message, way_out="fetch the file again"))
    return problems


def encode_header(
    tensors: Iterable[tuple[str, str, Sequence[int], int, int]], metadata: Sequence[tuple[str, str]]
) -> bytes:
    """Write length and JSON head for `(name, dtype, shape, begin, end)` rows, padded with spaces to a multiple of 8.

    Deterministic: metadata first and sorted, tensors in the given order.

    >>> encode_header([("w", "U8", (2,), 0, 2)], [])[8:]
    b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   '
    """
    body = _body(encode_entries(tensors), metadata)
    body += b" " * (-len(body) % ALIGNMENT)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def _body(entries: Mapping[str, str], metadata: Sequence[tuple[str, str]]) -> bytes:
    first = [f'"__metadata__":{_dump(dict(sorted(metadata)))}'] if metadata else []
    return f"{{{','.join([*first, *entries.values()])}}}".encode()


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def encode_entries(tensors: Iterable[tuple[str, str, Sequence[int], int, int]]) -> dict[str, str]:
    """The text of each row in a header, by name; of rows with one name, the last."""
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}
    entries: dict[str, str] = {}
    for name, dtype, extents, begin, end in tensors:
        shape = tuple(extents)
        kind = kinds.get((dtype, shape))
        if kind is None:
            kind = kinds[dtype, shape] = _dump({"dtype": dtype, "shape": shape, "data_offsets": []})[:-2]
        entries[name] = f"{encode_basestring(name)}:{kind}{begin},{end}]}}"
    return entries


def encoded_length(entries: int, metadata: Sequence[tuple[str, str]]) -> int:
    """Bytes that `encode_header` gives for metadata and further entries of so many bytes, commas included."""
    body = len(_body({}, metadata)) + entries
    return LENGTH_BYTES + body + -body % ALIGNMENT


def text_bytes(texts: Iterable[str]) -> int:
    """Bytes that texts take in a header, without quotes."""
    return len(encode_basestring("".join(texts)).encode()) - len('""')
