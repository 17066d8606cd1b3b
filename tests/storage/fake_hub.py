"""A Hub and its CDN on this machine, as far as shardmill asks them anything, and the cache of the Hub's library."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

REPO = "acme/tiny"
OLD, NEW = "a" * 40, "b" * 40
TOKEN = "hf_CanaryCanaryCanary"  # noqa: S105 - a bait
SIGNATURE = "SignatureCanary"
SHARD = np.random.default_rng(1).bytes(20_000_000)
CONFIG = b'{"model_type": "llama"}'
FILES = {"config.json": CONFIG, "model.safetensors": SHARD, "sub/model.safetensors": SHARD[:1000], "empty.txt": b""}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


@dataclass
class FakeHub:
    """A Hub and its CDN: what they hold, what they were asked, and what goes wrong."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {OLD: dict(FILES)})
    branches: dict[str, str] = field(default_factory=lambda: {"main": OLD, "refs/pr/1": OLD})
    private: bool = False
    refusal: tuple[int, str] | None = None
    """Status and code of every reply."""
    faults: list[int | str] = field(default_factory=list)
    """Of the next replies with file contents: a status, `cut` or `long`."""
    api_faults: list[int] = field(default_factory=list)
    log: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Server, method, path, Authorization."""
    spans: list[str] = field(default_factory=list)
    hub: str = ""
    cdn: str = ""

    def paths(self, part: str) -> list[str]:
        return [path for _, _, path, _ in self.log if part in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: ClassVar[FakeHub]
    name: ClassVar[str]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Stay quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        allowed = self.headers.get("Authorization", "")
        self.fake.log.append((self.name, self.command, path, allowed))
        if self.name == "cdn":
            self.send_content(path)
        elif self.fake.refusal is not None:
            self.reply(self.fake.refusal[0], headers={"X-Error-Code": self.fake.refusal[1]})
        elif self.fake.private and allowed != f"Bearer {TOKEN}":
            self.reply(401, headers={"X-Error-Code": "RepoNotFound"})
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self.send_info(path.removeprefix(f"/api/models/{REPO}/revision/"))
        elif path.startswith(f"/{REPO}/resolve/"):
            commit, _, name = path.removeprefix(f"/{REPO}/resolve/").partition("/")
            if name not in self.fake.commits.get(commit, {}):
                self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
            elif is_large(name):
                place = f"{self.fake.cdn}/{commit}/{name}?Signature={SIGNATURE}"
                self.reply(302, headers={"Location": place})
            else:
                self.send_content(f"/{commit}/{name}")
        else:
            self.reply(404, headers={"X-Error-Code": "RepoNotFound"})

    def send_info(self, revision: str) -> None:
        if self.fake.api_faults:
            self.reply(self.fake.api_faults.pop(0))
            return
        commit = self.fake.branches.get(revision, revision)
        if commit not in self.fake.commits:
            self.reply(404, headers={"X-Error-Code": "RevisionNotFound"})
            return
        siblings = []
        for name, data in self.fake.commits[commit].items():
            found: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_name(data)}
            if is_large(name):
                found["lfs"] = {"size": len(data), "sha256": sha256(data), "pointerSize": 130}
            siblings.append(found)
        info = {"id": REPO, "sha": commit, "siblings": siblings, "lastModified": "2026-01-02T03:04:05.000Z"}
        assert "blobs=true" in self.path.lower()
        self.reply(200, json.dumps(info).encode())

    def send_content(self, path: str) -> None:
        commit, _, name = path[1:].partition("/")
        data = self.fake.commits[commit][name]
        span = self.headers.get("Range", "")
        self.fake.spans.append(span)
        fault = self.fake.faults.pop(0) if self.fake.faults else ""
        if isinstance(fault, int):
            self.reply(fault, headers={"Retry-After": "0"})
            return
        first, last = (int(part) for part in span.removeprefix("bytes=").split("-"))
        if first >= len(data):
            self.reply(416)
            return
        part = data[first : last + 1]
        ranges = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}
        if fault == "cut":
            self.reply(206, part[: len(part) // 2], ranges, length=len(part))
            self.close_connection = True
        else:
            self.reply(206, part + b"!" if fault == "long" else part, ranges)

    def reply(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def run_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """Serve a Hub, and lead the library to it and to an empty cache."""
    made = FakeHub()
    servers = []
    for name in ("hub", "cdn"):
        handler = type("Served", (Handler,), {"fake": made, "name": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
    made.hub, made.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    monkeypatch.setattr(constants, "ENDPOINT", made.hub)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.hub + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    huggingface_hub.close_session()
    for server in servers:
        server.shutdown()
        server.server_close()


def fill_cache(files: dict[str, bytes], commit: str = OLD, branch: str = "main") -> Path:
    """Lay files out as the library does; returns the snapshot."""
    repo = Path(constants.HF_HUB_CACHE) / "models--acme--tiny"
    snapshot = repo / "snapshots" / commit
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "blobs").mkdir(exist_ok=True)
    (repo / "refs" / branch).write_text(commit)
    for name, data in files.items():
        blob = repo / "blobs" / (sha256(data) if is_large(name) else git_name(data))
        blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
