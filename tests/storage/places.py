"""Places where folders can lie, seen past the code under test: by the file system, by fsspec, by boto3."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from fsspec.implementations.memory import MemoryFileSystem

from shardmill.storage import s3, s3_upload
from shardmill.storage.folder import Folder
from shardmill.storage.location import open_folder
from storage.servers import S3Server


def use_small_parts(patch: pytest.MonkeyPatch, part: int) -> None:
    """Let S3 folders move `part` bytes at a time, and fetch blocks of 64 KiB."""
    for name in ("PART_BYTES", "COPY_PART_BYTES", "_MIB"):
        patch.setattr(s3_upload, name, part)
    patch.setattr(s3, "COPY_WHOLE_BYTES", part)
    patch.setattr(s3, "RANGE_BYTES", 1 << 16)


def brief(data: bytes) -> bytes | str:
    """Short contents as they are, long ones by length and digest, of which pytest can show a difference."""
    return data if len(data) <= 1000 else f"{len(data)} bytes {blake3(data).hexdigest()[:32]}"


class Place(ABC):
    """An empty place of its own for one test."""

    url: str
    part: int = 1 << 16
    """Bytes that the storage moves at a time."""
    keeps_tags = True

    def open(self) -> Folder:
        """Open another handle."""
        return open_folder(self.url)

    @abstractmethod
    def contents(self) -> dict[str, bytes]:
        """Everything that lies there, hidden and temporary files included."""

    def files(self) -> dict[str, bytes | str]:
        """The same in brief."""
        return {name: brief(data) for name, data in self.contents().items()}

    @abstractmethod
    def plant(self, name: str, data: bytes) -> None:
        """Write a file as another program would."""

    def plant_empty(self, names: Iterable[str]) -> None:
        """Write many files that hold nothing."""
        for name in names:
            self.plant(name, b"")

    def unfinished(self) -> list[str]:
        """What somebody began to write, and did not finish, in another form than a file."""
        return []


class LocalPlace(Place):
    keeps_tags = False

    def __init__(self, path: Path) -> None:
        self.root = path / "place"
        self.root.mkdir()
        self.url = str(self.root)

    def contents(self) -> dict[str, bytes]:
        found = [path for path in self.root.rglob("*") if path.is_file()]
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in sorted(found)}

    def plant(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self.root.parent / "new"
        new.write_bytes(data)
        new.replace(path)  # both exist for a moment, so that they differ in their inode


class MemoryPlace(Place):
    def __init__(self) -> None:
        self.url = f"memory://test-{secrets.token_hex(6)}/folder"
        self._files = MemoryFileSystem()
        self._root = f"{self.url.removeprefix('memory:/')}/"

    def contents(self) -> dict[str, bytes]:
        store = self._files.store
        return {key.removeprefix(self._root): store[key].getvalue() for key in sorted(store) if self._is_here(key)}

    def _is_here(self, key: str) -> bool:
        return key.startswith(self._root)

    def plant(self, name: str, data: bytes) -> None:
        self._files.pipe_file(self._root + name, data)

    def clear(self) -> None:
        for key in tuple(self._files.store):
            if key.startswith(self._root.removesuffix("folder/")):
                del self._files.store[key]


class S3Place(Place):
    def __init__(self, server: S3Server, patch: pytest.MonkeyPatch, endpoint: str = "") -> None:
        server.lead(patch, endpoint)
        self.server, self.part = server, server.smallest_part
        use_small_parts(patch, self.part)
        self.bucket, self.prefix = server.new_bucket(), "models/base"
        self.url = f"s3://{self.bucket}/{self.prefix}"

    def contents(self) -> dict[str, bytes]:
        begin = f"{self.prefix}/"
        keys = [key for key in self.server.keys(self.bucket) if key.startswith(begin)]
        return {key.removeprefix(begin): self._get(key) for key in keys}

    def _get(self, key: str) -> bytes:
        data: bytes = self.server.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return data

    def key(self, name: str) -> Mapping[str, Any]:
        """How boto3 wants a file to be named."""
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{name}"}

    def plant(self, name: str, data: bytes) -> None:
        self.server.client.put_object(**self.key(name), Body=data)

    def plant_empty(self, names: Iterable[str]) -> None:
        self.server.put_empty(self.bucket, (f"{self.prefix}/{name}" for name in names))

    def unfinished(self) -> list[str]:
        return self.server.open_uploads(self.bucket)
