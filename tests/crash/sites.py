"""Places in which the battery of interrupted runs works: a folder on disk, or a bucket of a test server."""

from __future__ import annotations

import hashlib
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import checkpoints

SHARDS = 12
PART_BYTES = 64 << 10
"""Parts of uploads in the battery, so that shards of a toy model take several."""


def toy_model(root: Path) -> Path:
    """A small Llama whose fused sets straddle its 12 shards, and a tokenizer file."""
    tensors = checkpoints.llama(layers=5, hidden=256, width=512)
    config = checkpoints.LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5}
    parts = checkpoints.deal(tensors, SHARDS)
    assert len(parts) == SHARDS
    return checkpoints.write(root, parts, config, **{"tokenizer_config.json": "{}", "README.md": "toy"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Locations of one attempt."""

    source: str
    destination: str
    store: str


class Site(Protocol):
    """Where an attempt leaves its files, and how to look at them without any code of shardmill."""

    def places(self, name: str) -> Places:
        """Fresh locations for one attempt; the source is the same for all."""

    def files(self, places: Places) -> dict[str, str]:
        """Digest of every file of an attempt but the source, by path; unfinished uploads count as files."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Length in bytes of every file of a destination or store, by name."""

    def read(self, folder: str, name: str) -> bytes:
        """A file of a destination or store."""

    def fetch_destination(self, places: Places, into: Path) -> None:
        """Copy what the destination holds to disk, hidden things left out, for loaders to open."""

    def clear(self, places: Places) -> None:
        """Delete an attempt."""


class LocalSite:
    """A folder on disk."""

    def __init__(self, root: Path, model: Path) -> None:
        self._root, self._model = root, model

    def places(self, name: str) -> Places:
        root = self._root / name
        return Places(source=str(self._model), destination=str(root / "model"), store=str(root / "store"))

    def files(self, places: Places) -> dict[str, str]:
        root = Path(places.store).parent
        return {str(path.relative_to(root)): _describe(path) for path in sorted(root.rglob("*")) if path.is_file()} | {
            f"{path.relative_to(root)}/": "folder"
            for path in sorted(root.rglob("*"))
            if path.is_dir() and not any(path.iterdir()) and path.name not in EMPTY_FOLDERS
        }

    def sizes(self, folder: str) -> dict[str, int]:
        found = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(found)}

    def read(self, folder: str, name: str) -> bytes:
        return (Path(folder) / name).read_bytes()

    def fetch_destination(self, places: Places, into: Path) -> None:
        with suppress(FileNotFoundError):
            shutil.copytree(places.destination, into, dirs_exist_ok=True)

    def clear(self, places: Places) -> None:
        shutil.rmtree(Path(places.store).parent, ignore_errors=True)


EMPTY_FOLDERS = frozenset({"blobs", "receipts", "digests", "shapes", "verified", "set-aside", "published"})


def _describe(path: Path) -> str:
    assert stat.S_ISREG(path.lstat().st_mode), path
    return hashlib.sha256(path.read_bytes()).hexdigest()


class S3Site:
    """A bucket of a server that the environment names; looked at through boto3."""

    def __init__(self, bucket: str, model: Path, *, client: Any) -> None:
        self._bucket, self._client = bucket, client
        for path in sorted(model.iterdir()):
            client.put_object(Bucket=bucket, Key=f"source/{path.name}", Body=path.read_bytes())

    def places(self, name: str) -> Places:
        base = f"s3://{self._bucket}/{name}"
        return Places(source=f"s3://{self._bucket}/source", destination=f"{base}/model", store=f"{base}/store")

    def files(self, places: Places) -> dict[str, str]:
        prefix = self._prefix(places)
        found = {entry["Key"].removeprefix(prefix): entry["ETag"] for entry in self._entries(prefix)}
        uploads = self._client.list_multipart_uploads(Bucket=self._bucket).get("Uploads", ())
        return found | {
            f"upload of {upload['Key'].removeprefix(prefix)} {upload['UploadId']}": "upload"
            for upload in uploads
            if upload["Key"].startswith(prefix)
        }

    def sizes(self, folder: str) -> dict[str, int]:
        prefix = self._key(folder)
        return {entry["Key"].removeprefix(prefix): entry["Size"] for entry in self._entries(prefix)}

    def read(self, folder: str, name: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=self._bucket, Key=self._key(folder) + name)["Body"].read()
        return data

    def _key(self, folder: str) -> str:
        return folder.removeprefix(f"s3://{self._bucket}/") + "/"

    def fetch_destination(self, places: Places, into: Path) -> None:
        prefix = f"{self._prefix(places)}model/"
        for key in self._keys(prefix):
            path = into / key.removeprefix(prefix)
            if not path.name.startswith("."):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._client.download_file(self._bucket, key, str(path))

    def clear(self, places: Places) -> None:
        keys = [{"Key": key} for key in self._keys(self._prefix(places))]
        if keys:
            self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": keys})

    def _prefix(self, places: Places) -> str:
        return self._key(places.store).removesuffix("store/")

    def _keys(self, prefix: str) -> list[str]:
        return [entry["Key"] for entry in self._entries(prefix)]

    def _entries(self, prefix: str) -> Iterable[dict[str, Any]]:
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
            yield from page.get("Contents", ())
