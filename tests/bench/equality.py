"""Before anything is timed: are the results right?

Compiled and reference kernels must write the same files. On a float32 source, llm-compressor must store the same bytes
for every quantized weight; on other sources it computes in their dtype (D7 of docs/divergences.md), so there only
names, dtypes and shapes are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Final

from bench import checkpoints, reference
from bench.measure import execute, quantize, shardmill, shards_of

_SCRIPT: Final = reference.ROOT / "tests" / "reference" / "run_reference.py"


class WrongResult(Exception):
    """A result is not what it has to be; timing it would be pointless."""


@contextmanager
def scratch(home: Path) -> Iterator[Path]:
    """A folder for results, gone afterwards."""
    folder = Path(mkdtemp(dir=home, prefix="results-"))
    try:
        yield folder
    finally:
        rmtree(folder, ignore_errors=True)


def check_kernels(source: Path, preset: str, home: Path) -> None:
    """Compare the files that both kernels write.

    Raises:
        WrongResult: a byte differs.
    """
    with scratch(home) as folder:
        for kernels in ("cpu", "reference"):
            quantize(source, folder / kernels / "result", preset, SHARDMILL_KERNELS=kernels)
        fast, slow = shards_of(folder / "cpu" / "result"), shards_of(folder / "reference" / "result")
        if not fast or [(p.name, p.read_bytes()) for p in fast] != [(p.name, p.read_bytes()) for p in slow]:
            raise WrongResult(f"{preset}: compiled and reference kernels write different bytes for {source.name}")


def check_reference(source: Path, presets: Sequence[str], home: Path) -> None:
    """Compare every param of every quantized weight of a float32 source with llm-compressor's.

    Raises:
        WrongResult: a byte differs.
    """
    with scratch(home) as folder:
        pairs = [word for preset in presets for word in (preset, folder / "theirs" / preset)]
        execute([reference.PYTHON, "-P", _SCRIPT, source, *pairs], **reference.ENVIRONMENT)
        for preset in presets:
            quantize(source, folder / "ours" / preset, preset)
            ours, theirs = _quantized(folder / "ours" / preset), _quantized(folder / "theirs" / preset)
            if not ours or ours != theirs:
                names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
                raise WrongResult(f"{preset}: differs from llm-compressor in {', '.join(names[:5]) or 'everything'}")


def _quantized(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = checkpoints.contents(folder)
    modules = {name.rpartition(".")[0] for name in found if name.endswith(".weight_scale")}
    return {name: value for name, value in found.items() if name.rpartition(".")[0] in modules}


def check_whole(result: Path, source: Path) -> None:
    """Let `shardmill verify` compare a result with its source.

    Raises:
        CommandFailed: it found a problem.
    """
    shardmill("verify", result, "--against", source, "--quiet")


def check_names(ours: Path, theirs: Path, preset: str) -> None:
    """Compare names, dtypes and shapes, wherever in the checkpoint they lie.

    Raises:
        WrongResult: they differ.
    """
    left, right = checkpoints.stored(ours), checkpoints.stored(theirs)
    if left != right:
        names = sorted(name for name in {*left, *right} if left.get(name) != right.get(name))
        raise WrongResult(f"{preset}: {len(names)} tensors are not alike, such as {names[0]}")
