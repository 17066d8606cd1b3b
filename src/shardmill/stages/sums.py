"""SHA-256 of every file of a finished result, as `sha256sum` writes and checks it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

from shardmill.core.assemble import CONFIG_NAME, MANIFEST_NAME
from shardmill.core.index import INDEX_NAME
from shardmill.stages.result import INTAKE, VerifyWatch, read_manifest
from shardmill.storage.hashing import digest_file
from shardmill.storage.source import open_source

_HASHERS: Final = 4


def sha256_sums(destination: str, watch: VerifyWatch | None = None) -> str:
    """Hash the files that belong to a result; returns one line for each, sorted by name.

    Raises:
        CheckpointInvalid: there is no manifest that can be read, or a file is missing.
        SourceChanged: a file changed meanwhile.
    """
    told = watch or VerifyWatch()
    folder = open_source(destination, INTAKE)
    manifest = read_manifest(folder)
    apart = {MANIFEST_NAME, CONFIG_NAME} | ({INDEX_NAME} & set(folder.names()))
    names = sorted({*(shard.name for shard in manifest.shards), *(name for name, _ in manifest.files), *apart})
    told.on_total(sum(folder.identity(name).size for name in names))

    def line(name: str) -> str:
        digest = digest_file(folder.folder, name, "sha256")
        told.on_bytes(folder.identity(name).size)
        return sum_line(digest.value, name)

    with ThreadPoolExecutor(_HASHERS) as pool:
        return "".join(pool.map(line, names))


def sum_line(value: str, name: str) -> str:
    r"""One line as `sha256sum` writes it: a name with a backslash or a line break is escaped, and the line says so.

    >>> sum_line("00", "a.json"), sum_line("00", "a\\b")
    ('00  a.json\n', '\\00  a\\\\b\n')
    """
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{value}  {escaped}\n"
