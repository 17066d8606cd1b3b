"""Receipts: what vouches for a blob in the store. Data only; written last, after the blob is durable."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardmill.core.digest import Digest
from shardmill.core.statistics import Statistics

SCHEMA: Final = 1
_STEM: Final = re.compile(r"(f-[0-9a-f]{1,128})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobDigests:
    """Digests of one file: whole, and of its first and last block, which are cheap to check again."""

    whole: Digest
    head: Digest
    tail: Digest
    size: int
    """In bytes."""


@dataclass(frozen=True, slots=True)
class WeightRecord:
    """Error statistics of one quantized weight."""

    module: str
    scheme: str
    statistics: Statistics


@dataclass(frozen=True, slots=True)
class NonFinite:
    """NaN and Inf in a tensor that was copied."""

    tensor: str
    count: int
    first: tuple[int, ...]
    """Index of the first, in row-major order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Binds a job key to the bytes that the job gave."""

    key: str
    blob: BlobDigests
    tensors: tuple[str, ...]
    """Names of the tensors in the blob, in order."""
    weights: tuple[WeightRecord, ...]
    """Of the quantized weights, in order."""
    producer: tuple[tuple[str, str], ...]
    """Versions of what computed it."""
    nonfinite: tuple[NonFinite, ...] = ()
    """Copied tensors that hold NaN or Inf, in order."""
    stem: str = ""
    """Name of the blob where it is not the key: it had to be named before the content of its sources was known."""

    @property
    def blob_stem(self) -> str:
        """Name of the blob without its ending."""
        return self.stem or self.key

    def to_bytes(self) -> bytes:
        """Encode as JSON."""
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "key": self.key,
            "blob": {
                "digest": str(self.blob.whole),
                "head": str(self.blob.head),
                "tail": str(self.blob.tail),
                "size": self.blob.size,
            },
            "tensors": list(self.tensors),
            "weights": weights_to_json(self.weights),
            "producer": dict(self.producer),
        }
        if self.nonfinite:  # what nearly no receipt has is left out
            document["nonfinite"] = [{"tensor": n.tensor, "count": n.count, "first": n.first} for n in self.nonfinite]
        if self.stem:
            document["stem"] = self.stem
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def parse_receipt(data: bytes) -> Receipt:
    """Read a receipt.

    Raises:
        ValueError: not JSON, another schema, or a field is missing or of the wrong type.
    """
    try:
        raw = json.loads(data)
        if raw["schema"] != SCHEMA:
            raise ValueError(f"receipt schema {raw['schema']!r}, expected {SCHEMA}")
        return Receipt(
            key=_text(raw["key"]),
            blob=_parse_blob(raw["blob"]),
            tensors=tuple(map(_text, _list(raw["tensors"]))),
            weights=parse_weights(raw["weights"]),
            producer=tuple((_text(name), _text(version)) for name, version in sorted(raw["producer"].items())),
            nonfinite=tuple(_parse_nonfinite(entry) for entry in _list(raw.get("nonfinite", []))),
            stem=_stem(raw.get("stem", "")),
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"malformed receipt: {type(error).__name__} {error}") from error


def weights_to_json(weights: Sequence[WeightRecord]) -> list[dict[str, Any]]:
    """Describe what was measured of weights."""
    return [{"module": w.module, "scheme": w.scheme, **w.statistics.to_json()} for w in weights]


def parse_weights(raw: Any) -> tuple[WeightRecord, ...]:
    """Read what `weights_to_json` made.

    Raises:
        KeyError: a field is missing.
        TypeError: one is of the wrong type.
    """
    return tuple(_parse_weight(entry) for entry in _list(raw))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {type(value).__name__}")
    return value


def _stem(value: Any) -> str:
    """A name that leads nowhere else."""
    if not _STEM.fullmatch(_text(value)):
        raise TypeError("expected a name of hex digits")
    return str(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {type(value).__name__}")
    return value


def _parse_blob(raw: Mapping[str, Any]) -> BlobDigests:
    size = _natural(raw["size"])
    whole, head, tail = (Digest.parse(_text(raw[field])) for field in ("digest", "head", "tail"))
    return BlobDigests(whole=whole, head=head, tail=tail, size=size)


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError("expected a non-negative integer")
    return value


def _parse_nonfinite(raw: Mapping[str, Any]) -> NonFinite:
    return NonFinite(_text(raw["tensor"]), _natural(raw["count"]), tuple(map(_natural, _list(raw["first"]))))


def _parse_weight(raw: Mapping[str, Any]) -> WeightRecord:
    numbers = {name: value for name, value in raw.items() if name not in ("module", "scheme")}
    return WeightRecord(_text(raw["module"]), _text(raw["scheme"]), Statistics.from_json(numbers))
