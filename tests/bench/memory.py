"""Section `memory`: peak resident size of `shardmill run`, beside a process that only imports what a run imports."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from bench import equality
from bench.checkpoints import TOY, llama, one_shard, one_tensor
from bench.lab import Lab
from bench.measure import Run, execute, quantize
from bench.results import MemoryRow

PRESETS: Final = ("FP8_DYNAMIC", "W4A16", "NVFP4A16")
_LOADED: Final = """
import contextlib, io, sys
from shardmill.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    code = main(sys.argv[1:])
print(*sorted(name for name in sys.modules if name != "__main__"))
sys.exit(code)
"""
_IMPORT: Final = """
import contextlib, importlib, sys
for name in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
"""


def measure(lab: Lab) -> None:
    """Measure one usual shard, one large one, and one weight that fills a shard."""
    size = lab.size
    tiny = lab.checkpoint(replace(llama(TOY), name="llama-toy"))
    for preset in PRESETS:
        with equality.scratch(lab.home) as folder:
            bare = _bare(tiny, folder / "out", preset)
        for spec in (one_shard(size, size.layers_per_shard), one_shard(size, size.large_layers), one_tensor(size)):
            source = lab.checkpoint(spec)
            with equality.scratch(lab.home) as folder:
                run = quantize(source, folder / "out", preset).run
            row = MemoryRow(
                checkpoint=spec.name, preset=preset, source_bytes=spec.source_bytes, runs=(run,), bare=(bare,)
            )
            lab.keep("memory", row)


def _bare(tiny: Path, destination: Path, preset: str) -> Run:
    """A process that imports the modules of a finished run."""
    words: list[str | Path] = ["run", tiny, destination, "--scheme", preset, "--device", "cpu", "--quiet"]
    loaded = execute([sys.executable, "-P", "-c", _LOADED, *words]).stdout.split()
    return execute([sys.executable, "-P", "-c", _IMPORT, *loaded]).run
