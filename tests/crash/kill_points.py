"""Stop a run of 12 shards at each of its storage operations, look at what is left, and run again.

    python tests/crash/kill_points.py --site local --fault kill --every 1 --load --folder DIR
    python tests/crash/kill_points.py --site s3 --fault ENOSPC --every 1 --folder DIR

For every operation number: a fresh attempt is killed, or made to fail, at that operation. Then

- the destination must not load, unless it is the finished result (`--load` opens it with transformers);
- the next run must succeed, compute no shard again that was finished, and leave exactly the files of an
  undisturbed run.

Each run is a fork of this process, which has imported everything but started no thread. Prints one JSON document, and
exits with 1 when a promise was broken. For S3 the environment names a test server; its smallest part is 64 KiB.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numba  # noqa: F401 - what a run needs is imported before the forks
import torch  # noqa: F401

import shardmill.kernels.shard  # noqa: F401
from crash import sites
from crash.sites import Places, Site
from shardmill.core.receipt import parse_receipt
from shardmill.core.recipe import uniform
from shardmill.errors import Refused, ShardFailures, ShardmillError, StorageFailed
from shardmill.kernels.lanes import CpuLane
from shardmill.stages.pipeline import run
from shardmill.stages.plan import Locations
from shardmill.storage.operations import Faults, watched

SCHEME = "NVFP4A16"
SETTLE_SECONDS = 2.1
"""Digests of younger files are not remembered, so runs on them would leave other files in the store."""
ATTEMPT = "attempt"
"""One place for all, since names in a store depend on it."""


@dataclass(slots=True)
class Report:
    """What the battery found."""

    operations: int = 0
    """Of an undisturbed run."""
    attempts: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    """Broken promises."""

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


def in_fork(work: Callable[[], Any]) -> tuple[int, Any]:
    """Run something in a fork of this process: the signal that ended it or 0, and what it returned."""
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            try:
                pickle.dump(work(), answer)
                answer.flush()
                os._exit(0)
            except BaseException:  # noqa: BLE001 - whatever it is, a fork must not go on as its parent
                traceback.print_exc()
                os._exit(70)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            return os.WTERMSIG(status), None
        if os.WEXITSTATUS(status):
            raise RuntimeError("a fork broke down; its traceback is above")
        answer.seek(0)
        return 0, pickle.load(answer)  # noqa: S301 - our own child wrote it


def convert(places: Places, faults: Faults) -> dict[str, Any]:
    """One run, as a user starts it; what became of it as plain values."""
    if places.store.startswith("s3:"):
        make_parts_small()
    locations = Locations(source=places.source, destination=places.destination, store=places.store)
    try:
        with watched(faults):
            result = run(locations, uniform(SCHEME))
    except ShardmillError as error:
        return {"error": describe(error), "is_typed": is_storage_error(error), "log": faults.log}
    return {"hits": {o.shard: o.is_hit for o in result.outcomes}, "log": faults.log}


def make_parts_small() -> None:
    """Let shards of a toy model take several parts of an upload."""
    from shardmill.storage import s3_upload

    s3_upload.PART_BYTES = sites.PART_BYTES  # type: ignore[misc]


def describe(error: BaseException) -> str:
    """What a user reads."""
    return f"{type(error).__name__}: {error}"


def is_storage_error(error: BaseException) -> bool:
    """Whether an error says that a storage operation failed: itself, or that of all failed shards, or of a place."""
    if isinstance(error, ShardFailures):
        return all(is_storage_error(cause) for _, cause in error.failures)
    if isinstance(error, Refused):
        return all(p.kind in ("destination-unwritable", "storage-unreachable") for p in error.problems)
    return isinstance(error, StorageFailed)


def finished_shards(site: Site, places: Places) -> set[str]:
    """Job keys of the shards that an interrupted run finished: receipt and whole blob are there."""
    sizes = site.sizes(places.store)
    names = [name for name in sizes if name.startswith("receipts/") and name.endswith(".json")]
    receipts = [parse_receipt(site.read(places.store, name)) for name in names]
    return {r.key for r in receipts if sizes.get(f"blobs/{r.blob_stem}.safetensors") == r.blob.size}


def computed_shards(site: Site, places: Places, outcome: dict[str, Any]) -> set[str]:
    """Job keys of the shards that a successful run computed."""
    manifest = json.loads(site.read(places.destination, "shardmill.json"))
    return {entry["key"] for entry in manifest["shards"] if not outcome["hits"].get(entry["name"], True)}


def loads(site: Site, places: Places) -> bool:
    """Whether transformers takes what lies at the destination for a model."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        site.fetch_destination(places, Path(folder))
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except (OSError, ValueError, KeyError, RuntimeError):
            return False
    return True


def _is_named(where: str, text: str) -> bool:
    return Path(where).name[:20] in text or where.rpartition("/")[0] in text


class Battery:
    """All attempts at one site with one kind of fault."""

    def __init__(self, site: Site, fault: str, *, is_lasting: bool, is_loaded: bool) -> None:
        self.site, self.fault = site, fault
        self.is_lasting, self.is_loaded = is_lasting, is_loaded
        self.report = Report()
        clean = site.places(ATTEMPT)
        site.clear(clean)
        _, outcome = in_fork(lambda: convert(clean, Faults()))
        assert "hits" in outcome, outcome
        self.expected = site.files(clean)
        self.report.operations = len(outcome["log"])
        self.log = outcome["log"]
        site.clear(clean)

    def run(self, first: int, every: int) -> Report:
        """Try every n-th operation."""
        for number in range(first, self.report.operations + 1, every):
            places = self.site.places(ATTEMPT)
            self.site.clear(places)
            self.attempt(number, places)
        return self.report

    def attempt(self, number: int, places: Places) -> None:
        """Disturb one run, look at what it left, and run again."""
        self.report.attempts += 1
        faults = Faults(self.fault, number, is_lasting=self.is_lasting)
        killed, outcome = in_fork(lambda: convert(places, faults))
        self._judge_end(number, killed, outcome)
        left = self.site.files(places)
        self._judge_state(number, places, left)
        finished = finished_shards(self.site, places)
        killed, again = in_fork(lambda: convert(places, Faults()))
        if killed or "hits" not in again:
            self._fail(number, f"the next run did not succeed: {again}")
            return
        if redone := finished & computed_shards(self.site, places, again):
            self._fail(number, f"{len(redone)} finished shards were done again")
        self._judge_files(number, self.site.files(places))

    def _judge_end(self, number: int, killed: int, outcome: dict[str, Any] | None) -> None:
        if self.fault == "kill":
            if killed:
                self.report.count("killed")
            else:  # threads interleave: this run had fewer operations
                self.report.count("ended before")
            if killed not in (0, signal.SIGKILL):
                self._fail(number, f"ended by signal {killed}")
            return
        assert outcome is not None
        if "error" not in outcome:
            self.report.count("went on")
            return
        self.report.count("failed")
        failed = outcome["log"][number - 1 : None if self.is_lasting else number]
        if not outcome["is_typed"]:
            self._fail(number, f"no typed error of the storage: {outcome['error']}")
        elif not any(_is_named(where, outcome["error"]) for _, where in failed):
            self._fail(number, f"the error names none of {failed[:3]}: {outcome['error']}")

    def _judge_state(self, number: int, places: Places, left: dict[str, str]) -> None:
        final = {path: digest for path, digest in self.expected.items() if path.startswith("model/")}
        found = {path: digest for path, digest in left.items() if path in final}
        is_final = found == final
        if "model/config.json" in found and not is_final:
            self._fail(number, f"config.json is there and the result is not: {sorted(set(final) ^ set(found))[:5]}")
        if self.is_loaded:
            _, is_loadable = in_fork(lambda: loads(self.site, places))
            if is_loadable != is_final:
                self._fail(number, f"transformers loads it: {is_loadable}, it is final: {is_final}")
            self.report.count("loadable" if is_loadable else "not loadable")

    def _judge_files(self, number: int, found: dict[str, str]) -> None:
        extra, missing = set(found) - set(self.expected), set(self.expected) - set(found)
        if extra or missing:
            self._fail(number, f"left over: {sorted(extra)[:5]}, missing: {sorted(missing)[:5]}")
        unequal = sorted(name for name in set(found) & set(self.expected) if self._differs(name, found[name]))
        if unequal:
            self._fail(number, f"other bytes than an undisturbed run: {unequal[:5]}")

    def _differs(self, name: str, digest: str) -> bool:
        return name.startswith(("model/", "store/blobs/")) and digest != self.expected[name]

    def _fail(self, number: int, what: str) -> None:
        name, where = self.log[min(number, len(self.log)) - 1]
        self.report.failures.append(f"{self.fault}@{number} (about {name} {where}): {what}")


def main() -> None:
    """Run the battery and print its report."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--site", choices=["local", "s3"], required=True)
    parser.add_argument("--fault", default="kill", help="kill, or the name of an errno (%(default)s)")
    parser.add_argument("--lasting", action="store_true", help="all operations from that one on fail")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--load", action="store_true", help="open what is left with transformers")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    shutil.rmtree(options.folder / "attempts", ignore_errors=True)
    load_ahead(with_transformers=options.load)
    model = options.folder / "source"
    if not model.exists():
        sites.toy_model(model)
        time.sleep(SETTLE_SECONDS)
    battery = Battery(
        make_site(options.site, options.folder / "attempts", model),
        options.fault,
        is_lasting=options.lasting,
        is_loaded=options.load,
    )
    report = battery.run(options.first, options.every)
    json.dump(asdict(report), sys.stdout, indent=1)
    sys.exit(bool(report.failures))


def load_ahead(*, with_transformers: bool) -> None:
    """Load what every fork would load again: the compiled kernels, and the loaders of transformers."""
    lane, block = CpuLane(), memoryview(bytes(2 * 16 * 256))
    extent = lane.measure(block, "BF16", (16, 256))
    for group in uniform(SCHEME).groups:
        lane.encode(block, "BF16", (16, 256), group.scheme, extent)
    if with_transformers:
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


def make_site(kind: str, root: Path, model: Path) -> Site:
    """The place to work in."""
    if kind == "local":
        return sites.LocalSite(root, model)
    import boto3
    import s3fs  # noqa: F401 - as above
    from botocore.loaders import JSONFileLoader

    import shardmill.storage.s3  # noqa: F401

    # every fork would read the models of the API again; this client reads them for all
    JSONFileLoader.load_file = functools.cache(JSONFileLoader.load_file)
    client = boto3.client("s3")
    bucket = f"kill-points-{secrets.token_hex(6)}"
    client.create_bucket(Bucket=bucket)
    return sites.S3Site(bucket, model, client=client)


if __name__ == "__main__":
    main()
