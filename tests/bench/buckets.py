"""From bucket to bucket beside a bare client that moves the same bytes, on the S3 server that the environment names.

    tests/storage/ceph.sh run python tests/bench/buckets.py [--shards 4] [--repeats 5] [--presets NVFP4A16 FP8_DYNAMIC]

Compares the result with one that was made on disk before it measures anything. Runs take turns; what counts is the
ratio of the bare client's time to ours, both from the start of the process to its end. Peak memory is told above what
the imports take, and every file that a run leaves on this machine's disk is listed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import boto3
from boto3.s3.transfer import TransferConfig

from bench.checkpoints import FULL, TOY, Noise, llama, prepare
from bench.measure import Run, execute, quantize, shardmill
from storage.servers import RADOSGW_VARIABLE, read_exports

CLIENT = Path(__file__).with_name("client.py")
TARGET = 0.8
"""Least share of the bare client's throughput."""
MEMORY_TARGET = 700_000_000
"""Most bytes above the imports."""
BUCKET = "bench"
IMPORTS = (
    "import shardmill.cli, shardmill.stages.pipeline, shardmill.kernels.shard, shardmill.kernels.compiled, "
    "shardmill.storage.s3, aiobotocore.session, s3fs"
)
"""All that a run imports, numba among it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--presets", nargs="+", default=["NVFP4A16", "FP8_DYNAMIC"])
    parser.add_argument("--toy", action="store_true", help="a tiny checkpoint, to try the benchmark itself")
    chosen = parser.parse_args(arguments)
    if file := os.environ.get(RADOSGW_VARIABLE):
        os.environ |= read_exports(Path(file).read_text())
    client = boto3.client("s3")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
        source = prepare(llama(TOY if chosen.toy else FULL, chosen.shards), Path(home), Noise())
        client.create_bucket(Bucket=BUCKET)
        _upload(client, source)
        for preset in chosen.presets:
            _measure(client, source, Path(home), preset, chosen.repeats)
    return 0


def _upload(client: Any, source: Path) -> None:
    settings = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=2)
    for path in sorted(source.iterdir()):
        client.upload_file(str(path), BUCKET, f"in/{path.name}", Config=settings)


def _measure(client: Any, source: Path, home: Path, preset: str, repeats: int) -> None:
    quantize(source, home / "expected" / "model", preset)
    sizes = {path.name: path.stat().st_size for path in sorted((home / "expected" / "model").glob("*.safetensors"))}
    _clear(client, "out/")
    _convert(preset)
    _compare(client, home / "expected" / "model")
    shutil.rmtree(home / "expected")
    ours, bare, kept = [], [], []
    for _ in range(repeats):
        _clear(client, "out/")
        with tempfile.TemporaryDirectory() as private:
            ours.append(_convert(preset, TMPDIR=private, HOME=private))
            kept += [str(path) for path in Path(private).rglob("*") if path.is_file()]
        _clear(client, "out/")
        words = [word for name, size in sizes.items() for word in (name, str(size))]
        bare.append(execute([sys.executable, CLIENT, f"s3://{BUCKET}/in", f"s3://{BUCKET}/out", *words]).run)
    imports = execute([sys.executable, "-c", IMPORTS]).run
    _tell(preset, ours, bare, imports, sum(path.stat().st_size for path in source.iterdir()), sum(sizes.values()), kept)


def _convert(preset: str, **environment: str) -> Run:
    words = ("run", f"s3://{BUCKET}/in", f"s3://{BUCKET}/out/model", "--scheme", preset, "--device", "cpu", "--quiet")
    return shardmill(*words, **environment).run


def _tell(
    preset: str, ours: list[Run], bare: list[Run], imports: Run, read: int, written: int, kept: list[str]
) -> None:
    mine, theirs = median(run.seconds for run in ours), median(run.seconds for run in bare)
    whole = max(run.peak_bytes for run in ours)
    peak = whole - imports.peak_bytes
    print(f"{preset}: {read / 1e9:.2f} GB read, {written / 1e9:.2f} GB written; same bytes as on disk")
    print(f"  ours {_all(ours)} s, bare client {_all(bare)} s")
    print(f"  throughput {theirs / mine:.2f} of the bare client's (target {TARGET}), {read / mine / 1e6:.0f} MB/s read")
    above = f"{peak / 1e6:.0f} MB above the imports (target {MEMORY_TARGET / 1e6:.0f})"
    print(f"  peak memory {above}, {whole / 1e6:.0f} in all")
    print(f"  files on this machine's disk: {kept or 'none'}")


def _all(runs: Sequence[Run]) -> str:
    return ", ".join(f"{run.seconds:.1f} ({run.cpu_seconds:.1f} of a processor, load {run.load:.1f})" for run in runs)


def _compare(client: Any, expected: Path) -> None:
    for path in sorted(expected.iterdir()):
        body = client.get_object(Bucket=BUCKET, Key=f"out/model/{path.name}")["Body"]
        with path.open("rb") as file:
            while ours := file.read(1 << 22):
                if body.read(len(ours)) != ours:
                    sys.exit(f"{path.name} differs from the one that was made on disk")
        if body.read(1):
            sys.exit(f"{path.name} is longer than the one that was made on disk")


def _clear(client: Any, prefix: str) -> None:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
        keys = [{"Key": entry["Key"]} for entry in page.get("Contents", ())]
        if keys:
            client.delete_objects(Bucket=BUCKET, Delete={"Objects": keys})
    if file := os.environ.get(RADOSGW_VARIABLE):  # it frees what was deleted much later: the next run would be in want
        settings = Path(file).with_name("ceph.conf")
        collect = ("radosgw-admin", "-c", settings, "gc", "process", "--include-all")
        subprocess.run(collect, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
