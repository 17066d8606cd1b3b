"""Figures of a report for machines: one row for each quantized weight and each other tensor of the source."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import Any, Final

from shardmill.core.recipe import recipe_to_json
from shardmill.core.report import Part, Report, tensor_rows
from shardmill.core.summary import summary_document
from shardmill.errors import Problem, RecipeInvalid

SCHEMA: Final = 1
"""Of the JSON document and of the table."""
_COLUMNS: Final = (
    ("shard", "string"),
    ("name", "string"),
    ("part", "string"),
    ("layer", "int32"),
    ("expert", "int32"),
    ("action", "string"),
    ("scheme", "string"),
    ("reason", "string"),
    ("count", "int64"),
    ("relative_error", "float64"),
    ("sqnr_db", "float64"),
    ("max_error", "float64"),
    ("amax", "float64"),
    ("clipped", "int64"),
    ("zeroed", "int64"),
    ("nonzero", "int64"),
)
"""Names and types of the columns; all may be null but the first three and `action`."""


def to_json(report: Report) -> bytes:
    """Write a report as a JSON document."""
    manifest = report.manifest
    document = {
        "schema": SCHEMA,
        "destination": report.origin.destination,
        "base_model": report.origin.base_model or None,
        "architecture": report.origin.architecture or None,
        "seconds": report.origin.seconds,
        "notes": list(report.origin.notes),
        "plan": manifest.plan,
        "versions": dict(manifest.versions),
        "sources": manifest.source_digests,
        "outputs": {shard.name: str(shard.digest) for shard in manifest.shards},
        "recipe": recipe_to_json(manifest.recipe),
        "summary": summary_document(report.summary),
        "parts": [_part(part) for part in report.parts],
        "histograms": {module: asdict(found) for module, found in report.histograms.items()},
        "tensors": list(tensor_rows(report)),
    }
    return json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n"


def _part(part: Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "tensors": part.tensors,
        "quantized": part.quantized,
        "elements": part.elements,
        "bytes": part.nbytes,
        "bits_per_weight": part.bits_per_weight,
        **{name: value for name, value in part.statistics.to_json().items() if name != "count"},
    }


def check_parquet() -> None:
    """Make sure that tables can be written as Parquet.

    Raises:
        RecipeInvalid: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401  an extra: it takes 150 MB
    except ImportError as error:
        message = "expected pyarrow, which writes Parquet, found none"
        way_out = "pip install 'shardmill[parquet]', or take --json FILE"
        raise RecipeInvalid([Problem(kind="parquet-unavailable", message=message, way_out=way_out)]) from error


def to_parquet(report: Report) -> bytes:
    """Write the rows of a report as a Parquet file.

    Raises:
        RecipeInvalid: pyarrow is not installed.
    """
    check_parquet()
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [pa.field(name, getattr(pa, kind)()) for name, kind in _COLUMNS], metadata={"plan": report.manifest.plan}
    )
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(tensor_rows(report)), schema=schema), sink, compression="zstd")
    return sink.getvalue()
