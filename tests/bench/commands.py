"""Sections `startup`, `rerun` and `plan`: what the command line costs where there is little or nothing to compute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Final

from bench import equality
from bench.checkpoints import TOY, headers, llama, prepare, tiny_shards
from bench.lab import Lab
from bench.measure import Finished, execute, quantize, shardmill
from bench.results import CommandRow, PlanRow

PRESET: Final = "FP8_DYNAMIC"
PLANNED: Final = ("FP8_DYNAMIC", "NVFP4A16")
SETTLE_SECONDS: Final = 2.1
"""Digests of files younger than two seconds are not remembered."""


def measure_startup(lab: Lab) -> None:
    """Time commands on a tiny checkpoint."""
    tiny = lab.checkpoint(replace(llama(TOY), name="llama-toy"))
    with equality.scratch(lab.home) as folder:
        _fill_caches(tiny, folder)
        calls: dict[str, Callable[[int], Finished]] = {
            "python -c pass": lambda _: execute([sys.executable, "-P", "-c", "pass"]),
            "shardmill --version": lambda _: shardmill("--version"),
            "shardmill plan": lambda _: shardmill("plan", tiny, "--scheme", PRESET),
            "shardmill run": lambda turn: quantize(tiny, folder / str(turn) / "out", PRESET),
        }
        done = [{what: call(turn).run for what, call in calls.items()} for turn in range(lab.repeats)]
        for what in calls:
            lab.keep("startup", CommandRow(what=what, runs=tuple(turn[what] for turn in done)))
        first = quantize(tiny, folder / "compiled" / "out", PRESET, NUMBA_CACHE_DIR=str(folder / "numba"))
        lab.keep("startup", CommandRow(what="shardmill run, kernels compiled anew", runs=(first.run,)))


def _fill_caches(tiny: Path, folder: Path) -> None:
    """Compile kernels and modules where nobody has used them yet."""
    quantize(tiny, folder / "first" / "out", PRESET)


def measure_rerun(lab: Lab) -> None:
    """Run three times on many tiny shards; before the third, the destination is removed, and its store is not."""
    spec = tiny_shards(lab.size.many)
    source = lab.checkpoint(spec)
    time.sleep(SETTLE_SECONDS)
    with equality.scratch(lab.home) as folder:
        out = folder / "out"
        finished = [quantize(source, out, PRESET), quantize(source, out, PRESET)]
        rmtree(out)
        finished.append(quantize(source, out, PRESET))
    for what, done in zip(("first run", "second run", "third run, without the destination"), finished, strict=True):
        row = CommandRow(
            what=what,
            runs=(done.run,),
            hits=done.document["hits"],
            shards=len(spec.shards),
            source_bytes=spec.source_bytes,
        )
        lab.keep("rerun", row)


def measure_plan(lab: Lab) -> None:
    """Plan checkpoints of growing size; they have headers and no values."""
    for shards in lab.size.planned:
        spec = headers(shards)
        with equality.scratch(lab.home) as folder:
            source = prepare(spec, folder, lab.noise)
            runs = [
                [shardmill("plan", source, "--scheme", preset).run for preset in PLANNED] for _ in range(lab.repeats)
            ]
        for number, preset in enumerate(PLANNED):
            found = tuple(turn[number] for turn in runs)
            lab.keep("plan", PlanRow(preset=preset, shards=shards, tensors=spec.tensors, runs=found))
