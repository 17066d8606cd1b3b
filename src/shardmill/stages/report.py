"""Gather what a report of a finished result shows: manifest, headers of shards, and values if they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

from shardmill.core.assemble import CONFIG_NAME
from shardmill.core.manifest import Manifest
from shardmill.core.report import Origin, Report, WrittenTensor, build_report
from shardmill.core.strict_json import parse_json
from shardmill.errors import CheckpointInvalid, show
from shardmill.stages.histograms import measure_histograms
from shardmill.stages.plan import collection_paused
from shardmill.stages.result import INTAKE, VerifyWatch, read_manifest
from shardmill.storage.location import HUB, parse_location
from shardmill.storage.source import SourceFolder, open_source

_READERS: Final = 16
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""`owner/name`, as the Hub has them."""


def make_report(
    destination: str,
    *,
    source: str = "",
    base_model: str = "",
    seconds: float | None = None,
    with_histograms: bool = False,
    watch: VerifyWatch | None = None,
) -> Report:
    """Read what a report needs; tensor values only where the source is at hand.

    Args:
        source: its location, where it is known.
        base_model: of the source on the Hub; found in the location of the source or in config.json where it is empty.
        seconds: wall time of the run.
        with_histograms: whether the worst weights are read from source and result.

    Raises:
        CheckpointInvalid: there is no such folder, or no manifest in it that can be read.
        Refused: the source is no sound unquantized checkpoint.
        SourceChanged: a file changed meanwhile.
    """
    folder = open_source(destination, INTAKE)
    with collection_paused():
        manifest = read_manifest(folder)
        config = _config(folder)
        written, notes = _written(folder, manifest)
        origin = Origin(
            destination=destination,
            source=source,
            base_model=base_model or base_model_of(source, config),
            architecture=_architecture(config),
            seconds=seconds,
            notes=notes,
        )
        report = build_report(manifest, origin, written)
    if not with_histograms:
        return report
    worst = {weight.module: weight.statistics for weight in report.worst}
    return replace(report, histograms=measure_histograms(destination, source, worst, watch))


def _config(folder: SourceFolder) -> Mapping[str, Any]:
    """config.json, as far as it can be read: a report of a result that is damaged is a report, too."""
    try:
        document = parse_json(folder.read_text(CONFIG_NAME, "json_bytes"), file=CONFIG_NAME, kind="config-invalid")
    except CheckpointInvalid:
        return {}
    return document if isinstance(document, Mapping) else {}


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return ", ".join(name for name in names if isinstance(name, str)) if isinstance(names, list) else ""


def base_model_of(source: str, config: Mapping[str, Any] | None = None) -> str:
    """The repository of a source on the Hub, told by its location or its config; empty where neither tells.

    >>> base_model_of("hf://org/model@main"), base_model_of("/models/a", {"_name_or_path": "org/a"})
    ('org/model', 'org/a')
    >>> base_model_of("/models/a", {"_name_or_path": "/home/me/a"})
    ''
    """
    if source and (location := parse_location(source)).kind == HUB:
        return location.root
    name = (config or {}).get("_name_or_path")
    return name if isinstance(name, str) and _REPOSITORY.fullmatch(name) else ""


def _written(folder: SourceFolder, manifest: Manifest) -> tuple[list[WrittenTensor] | None, tuple[str, ...]]:
    """Every tensor of the output, or None and why not."""

    def read(name: str) -> list[WrittenTensor] | CheckpointInvalid:
        try:
            tensors = folder.read_header(name).header.tensors
        except CheckpointInvalid as error:
            return error
        return [WrittenTensor(spec.name, spec.shape, spec.nbytes) for spec in tensors]

    names = [shard.name for shard in manifest.shards]
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(read, names))
    bad = [name for name, result in zip(names, found, strict=True) if isinstance(result, CheckpointInvalid)]
    if bad:
        missing = f"{len(bad)} of {len(names)} shards, the first is {show(bad[0])}"
        return None, (f"Sizes by part are missing: the headers of {missing}, cannot be read here.",)
    return list(_flat(found)), ()


def _flat(found: list[list[WrittenTensor] | CheckpointInvalid]) -> Iterator[WrittenTensor]:
    for result in found:
        if not isinstance(result, CheckpointInvalid):
            yield from result
