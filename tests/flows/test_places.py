"""The flow where nothing lies on disk."""

from __future__ import annotations

from pathlib import Path

from served import Ask, run_id, states
from shardmill.core.recipe import uniform
from shardmill.flows.quantize_checkpoint import FlowSummary, quantize_checkpoint
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.storage.folder import Folder
from shardmill.storage.location import open_folder


def contents(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name, 1 << 30) for name in folder.listing()}


def test_flow_in_another_storage_writes_the_bytes_of_the_plain_loop(source: Path, tmp_path: Path, ask: Ask) -> None:
    run(
        Locations(source=str(source), destination=str(tmp_path / "loop" / "result")),
        uniform("NVFP4A16"),
        RunOptions(device="cpu", workers=1),
    )
    base = f"memory://{tmp_path.name}"
    origin = open_folder(f"{base}/in")
    for path in source.iterdir():
        origin.put(path.name, path.read_bytes())

    asked = ask(scheme="NVFP4A16", source=f"{base}/in", destination=f"{base}/out/result")
    first = quantize_checkpoint(asked)
    state = quantize_checkpoint(asked, return_state=True)

    assert contents(open_folder(f"{base}/out/result")) == contents(open_folder(str(tmp_path / "loop" / "result")))
    assert (first.shards, first.hits, first.destination) == (4, 0, f"{base}/out/result")
    again: FlowSummary = state.result()
    assert (again.hits, again.bytes_read) == (4, 0)
    assert set(states(run_id(state), 4).values()) == {"Cached"}
