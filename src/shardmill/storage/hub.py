"""Model repositories on the Hugging Face Hub, read at one commit; what the library's cache holds is read from disk."""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, NoReturn, Self, TypeVar

import httpx
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not marked

from shardmill.core.digest import Digest
from shardmill.core.layout import RowSpan
from shardmill.errors import (
    FileTooLarge,
    ObjectMissing,
    Problem,
    SourceChanged,
    StorageFailed,
    StorageUnavailable,
    TransferDamaged,
    refuse,
    show,
)
from shardmill.storage.blocks import BlockReader
from shardmill.storage.folder import FileIdentity, Folder, Loan, Reader, Traits, Writer
from shardmill.storage.hub_cache import (
    COMMIT,
    CachedFile,
    cached_commit,
    cached_files,
    is_inside,
    missing_files,
    repo_folder,
)
from shardmill.storage.local import RangeReader
from shardmill.storage.operations import operation

log = logging.getLogger(__name__)


class _PlainUrls(logging.Filter):
    """Keeps queries out of what httpx logs of each request: where the Hub redirects to, they are signatures."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        if isinstance(record.args, tuple):
            record.args = tuple(arg.copy_with(query=None) if isinstance(arg, httpx.URL) else arg for arg in record.args)
        return True


logging.getLogger("httpx").addFilter(_PlainUrls())

_REPO: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_THREADS: Final = 8
_TIMEOUT: Final = httpx.Timeout(30.0, connect=10.0)
"""Seconds without a byte after which a connection counts as lost."""
_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
_RESET: Final = re.compile(r"\bt=(\d{1,6})\b")
_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+)")
_LOG_IN: Final = "log in with `hf auth login` or set HF_TOKEN"
_REFUSALS: Final[Mapping[str, tuple[type[StorageFailed], str]]] = {
    "GatedRepo": (
        StorageFailed,
        f"access has to be granted first; accept the licence on the repository's page, then {_LOG_IN}",
    ),
    "DisabledRepo": (StorageFailed, "the repository is disabled; choose another one"),
    "RepoNotFound": (
        ObjectMissing,
        f"there is no such repository, or it is private; check the name, or {_LOG_IN}",
    ),
    "RevisionNotFound": (ObjectMissing, "there is no such revision; check its name"),
    "EntryNotFound": (ObjectMissing, "there is no such file; check its name"),
}
"""By the word for machines in the Hub's reply."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request is repeated that fails in passing."""

    tries: int = 6
    """Requests in a row that bring nothing."""
    first_wait: float = 0.5
    """Seconds before the second one; doubles from there on."""
    longest_wait: float = 8.0
    """Seconds, unless the Hub asks for more."""
    deadline: float = 300.0
    """Seconds for one range, all tries together."""


class _Passing(Exception):
    """Something that may go away; the Hub may tell after how many seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _Address:
    """Where to ask for a file: the Hub, and after its first redirect the place that it led to.

    The Hub counts what it is asked, so it is not asked again for each range. The other place never sees the token.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.direct = ""

    def note(self, reply: httpx.Response) -> None:
        """Remember where a reply came from, if that is another host."""
        if reply.url.netloc != httpx.URL(self.url).netloc:
            self.direct = str(reply.url)


class _HubReader(BlockReader):
    """Gives up requests that are being repeated as soon as it is left."""

    def __init__(self, identity: FileIdentity, fetch: Callable[[int, memoryview, threading.Event], None]) -> None:
        self._is_left = threading.Event()
        self._fetch = fetch
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="hub")
        super().__init__(identity, self._start_fetch, blocks=_THREADS, on_close=self._pool.shutdown)

    def _start_fetch(self, start: int, view: memoryview) -> Future[None]:
        return self._pool.submit(self._fetch, start, view, self._is_left)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_left.set()
        super().__exit__(kind, error, trace)


class _CachedReader:
    """A file in the library's cache under its identity on the Hub."""

    seams: Sequence[int] = ()

    def __init__(self, identity: FileIdentity, cached: CachedFile) -> None:
        self.identity = identity
        self._file = RangeReader(cached.path)
        found = self._file.identity.size
        if found != identity.size:
            self._file.__exit__(None, None, None)
            raise SourceChanged(
                f"{show(identity.url, 200)}: {identity.size} bytes expected, the cache holds {found}; "
                "delete the repository from the cache and run again"
            )

    @property
    def bytes_read(self) -> int:
        """Bytes that were asked for so far."""
        return self._file.bytes_read

    @bytes_read.setter
    def bytes_read(self, count: int) -> None:
        self._file.bytes_read = count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def expect_once(self, *, announces: bool, rows: Sequence[RowSpan] = ()) -> None:
        """As `Reader.expect_once`; nothing is remembered anyway."""

    def lend(self, offset: int, nbytes: int) -> Loan | None:
        """As `Reader.lend`."""
        return self._file.lend(offset, nbytes)

    def announce(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """As `Reader.announce`."""
        return self._file.announce(ranges)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `offset` on."""
        self._file.read_into(offset, view)


class HubFolder:
    """A model repository, or a folder of it, at one commit; see `Folder`. It cannot be written."""

    traits: Final = Traits(kind="hub", is_writable=False, is_remote=True)
    path: Final = None

    def __init__(
        self,
        repo: str,
        commit: str,
        subfolder: str,
        files: Mapping[str, FileIdentity],
        cached: Mapping[str, CachedFile],
        *,
        patience: Patience,
        is_offline: bool = False,
    ) -> None:
        """Take a repository that was looked up.

        Args:
            repo: `organization/name`.
            commit: 40 hex digits.
            subfolder: without slashes at its ends; empty for all.
            files: by name in the subfolder.
            cached: what need not be fetched, by name in the subfolder.
            patience: how long a request is repeated.
            is_offline: whether only the cache is asked.
        """
        self.repo = repo
        self.commit = commit
        self.url = _url(repo, commit, subfolder)
        self._subfolder = subfolder
        self._files = dict(sorted(files.items()))
        self._cached = cached
        self._patience = patience
        self._is_offline = is_offline

    # ---- looking

    def exists(self) -> bool:
        """Whether there is at least one file."""
        return bool(self._files)

    def listing(self, prefix: str = "") -> dict[str, FileIdentity]:
        """Every file below `prefix`; a commit never changes, so nothing is asked for again."""
        return {name: identity for name, identity in self._files.items() if name.startswith(prefix)}

    def identity(self, name: str) -> FileIdentity | None:
        """The state of a file."""
        return self._files.get(name)

    def check(self, name: str) -> None:
        """Make sure that a file is one of the repository."""
        if name not in self._files:
            raise refuse(
                "file-missing", "file is missing", file=name, way_out=f"choose a complete revision of {self.repo}"
            )

    # ---- reading

    def read(self, name: str, limit: int) -> bytes:
        """Read a small file whole; its bytes must have the digest that the Hub names it by."""
        identity = self._need("read", name)
        if identity.size > limit:
            message = f"read {show(identity.url, 200)}: {identity.size} bytes, the limit is {limit}"
            raise FileTooLarge(errno.EFBIG, message)
        data = self._read(name, identity, identity.size)
        if not _is_named(data, identity.version.rpartition(":")[2]):
            where = "in the local cache " if self._find_cached(name) else ""
            message = f"read {show(identity.url, 200)} failed: the bytes {where}do not have the digest of the file"
            raise TransferDamaged(errno.EIO, message)
        return data

    def read_start(self, name: str, length: int) -> tuple[FileIdentity, bytes]:
        """The identity and the first bytes of a file, in one request."""
        identity = self._need("read", name)
        return identity, self._read(name, identity, min(length, identity.size))

    def open(self, name: str) -> Reader:
        """Open a file, from the cache where it is there."""
        identity = self._need("open", name)
        cached = self._find_cached(name)
        if cached is not None:
            return _CachedReader(identity, cached)
        address = self._address(name)

        def fetch(start: int, view: memoryview, is_left: threading.Event) -> None:
            self._fetch(address, identity, start, view, is_left)

        return _HubReader(identity, fetch)

    def _find_cached(self, name: str) -> CachedFile | None:
        """The file in the cache; it may have been deleted there since the repository was opened."""
        cached = self._cached.get(name)
        return cached if cached and (self._is_offline or cached.path.is_file()) else None

    def _need(self, what: str, name: str) -> FileIdentity:
        identity = self._files.get(name)
        if identity is not None:
            return identity
        message = f"{what} {show(f'{self.url}/{name}', 200)} failed: there is no such file"
        if self._is_offline:
            message += f" in the local cache; {_fetch_hint(self.repo, self.commit)}"
        raise ObjectMissing(errno.ENOENT, message)

    def _read(self, name: str, identity: FileIdentity, length: int) -> bytes:
        data = bytearray(length)
        if self._find_cached(name):
            with self.open(name) as reader:
                reader.read_into(0, memoryview(data))
        elif length:
            self._fetch(self._address(name), identity, 0, memoryview(data), threading.Event())
        return bytes(data)

    def _address(self, name: str) -> _Address:
        inside = f"{self._subfolder}/{name}" if self._subfolder else name
        return _Address(hf_hub_url(self.repo, inside, revision=self.commit, endpoint=constants.ENDPOINT))

    def _fetch(
        self, address: _Address, identity: FileIdentity, start: int, view: memoryview, is_left: threading.Event
    ) -> None:
        """Fill a view, going on where a broken reply stopped."""
        reply = _Reply(identity, start, view, is_left)
        _patiently(
            f"read {show(identity.url, 200)}",
            lambda deadline: reply.ask(address, deadline),
            self._patience,
            progress=lambda: reply.done,
            is_left=is_left,
        )

    # ---- writing

    def _refuse_write(self, what: str, name: str = "") -> NoReturn:
        place = f"{self.url}/{name}" if name else self.url
        raise StorageFailed(
            errno.EROFS, f"{what} {show(place, 200)} failed: repositories are only read; choose a folder or a bucket"
        )

    def prepare(self) -> None:
        """Not possible."""
        self._refuse_write("create")

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Not possible."""
        del data, durable
        self._refuse_write("write", name)

    def create(self, name: str, data: bytes) -> bool:
        """Not possible."""
        del data
        self._refuse_write("create", name)

    def writer(self, name: str, size: int, *, tags: Mapping[str, str] = {}) -> Writer:
        """Not possible."""
        del size, tags
        self._refuse_write("create", name)

    def copy_in(self, name: str, origin: Folder, origin_name: str, *, tags: Mapping[str, str] = {}) -> bool:
        """Not possible."""
        del origin, origin_name, tags
        self._refuse_write("create", name)

    def move(self, name: str, target: str) -> None:
        """Not possible."""
        del target
        self._refuse_write("move", name)

    def remove(self, name: str) -> None:
        """Not possible."""
        self._refuse_write("delete", name)

    def probe(self) -> list[Problem]:
        """Tell that nothing can be written."""
        return [
            Problem(
                file=self.url,
                kind="destination-unwritable",
                message="repositories on the Hub are only read",
                way_out="choose a folder or a bucket, and upload the result from there",
            )
        ]

    def free_bytes(self) -> int | None:
        """Nothing that could be asked for."""
        return None

    def sweep(self, prefix: str = "", *, grace_seconds: float = 24 * 3600) -> int:
        """Not possible."""
        del grace_seconds
        self._refuse_write("sweep", prefix)


# ---- one range ------------------------------------------------------------------------------------------------------


class _Reply:
    """A range of a file as it comes in, over as many replies as it takes."""

    def __init__(self, identity: FileIdentity, start: int, view: memoryview, is_left: threading.Event) -> None:
        self._identity = identity
        self._start = start
        self._view = view
        self._is_left = is_left
        self._is_first = True
        self.done = 0
        """Bytes that are in the view."""

    def ask(self, address: _Address, deadline: float) -> None:
        """Ask for what is missing.

        Raises:
            _Passing: it is worth another try.
        """
        first, last = self._start + self.done, self._start + len(self._view) - 1
        if first > last:
            return
        direct, self._is_first = address.direct if self._is_first else "", False
        headers = {**build_hf_headers(token=False if direct else None), "Range": f"bytes={first}-{last}"}
        headers["Accept-Encoding"] = "identity"
        with (
            operation("read", self._identity.url),
            get_session().stream("GET", direct or address.url, headers=headers, timeout=_TIMEOUT) as reply,
        ):
            if direct and reply.is_client_error and reply.status_code != 416:
                raise _Passing("the address that the Hub gave is no longer good")
            self._check(reply, first)
            address.note(reply)
            for chunk in reply.iter_raw():
                self._take(chunk)
                if self._is_left.is_set() or time.monotonic() > deadline:
                    raise _Passing("the reply takes too long")
        if self.done < len(self._view):
            raise _Passing("the reply ends too early")

    def _check(self, reply: httpx.Response, first: int) -> None:
        size, place = self._identity.size, show(self._identity.url, 200)
        if reply.status_code == 206:
            found = _RANGE.fullmatch(reply.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != first:
                raise _Passing("the reply is of another range")
            if int(found[2]) != size:
                raise SourceChanged(f"{place}: {size} bytes expected, the Hub sends {found[2]}; run again")
        elif reply.status_code == 416:
            raise SourceChanged(f"{place} ends before byte {first}, {size} bytes expected; run again")
        elif reply.status_code != 200:
            raise _typed(f"read {place}", reply.status_code, reply.headers)
        elif self._start or len(self._view) < size:
            message = f"read {place} failed: the Hub sends whole files only; download the repository first"
            raise StorageFailed(errno.ENOTSUP, message)
        else:
            self.done = 0

    def _take(self, chunk: bytes) -> None:
        if self.done + len(chunk) > len(self._view):
            raise _Passing("the reply is too long")
        self._view[self.done : self.done + len(chunk)] = chunk
        self.done += len(chunk)


def _is_named(data: bytes, blob: str) -> bool:
    """Whether bytes have the name that the Hub gives their blob: SHA-256, or the object name of git."""
    if len(blob) == 64:
        return hashlib.sha256(data).hexdigest() == blob
    if len(blob) == 40:
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == blob
    return True


# ---- trying again ---------------------------------------------------------------------------------------------------


def _patiently(
    what: str,
    attempt: Callable[[float], T],
    patience: Patience,
    *,
    progress: Callable[[], int] = int,
    is_left: threading.Event | None = None,
) -> T:
    """Do something until it works, fails for good, or patience ends; tries that bring bytes are not counted.

    Raises:
        StorageUnavailable: it kept failing in passing.
    """
    is_left = is_left or threading.Event()
    deadline = time.monotonic() + patience.deadline
    vain = 0
    while True:
        before = progress()
        try:
            return attempt(deadline)
        except _Passing as error:
            reason, asked = str(error), error.wait
        except httpx.RequestError as error:
            reason, asked = f"the connection failed ({type(error).__name__})", 0.0
        vain = 0 if progress() > before else vain + 1
        wait = max(asked, min(patience.first_wait * 2 ** max(0, vain - 1), patience.longest_wait))
        if vain >= patience.tries or time.monotonic() + wait > deadline or is_left.wait(wait):
            message = f"{what} failed: {reason}; try again later, or check the network"
            raise StorageUnavailable(errno.ETIMEDOUT, message)


def _typed(what: str, status: int, headers: Mapping[str, str]) -> Exception:
    """The error for a status that is no success; tells nothing that the server wrote."""
    if status in _PASSING:
        return _Passing(f"the Hub answers {status}", _wait_asked_for(headers))
    kind, reason = _REFUSALS.get(headers.get("X-Error-Code", ""), (StorageFailed, ""))
    if not reason and status in {404, 410}:
        kind, reason = ObjectMissing, "there is no such thing on the Hub; check the name"
    elif not reason and status in {401, 403}:
        reason = f"access denied ({status}); {_LOG_IN}, with a token that may read the repository"
    code = errno.ENOENT if kind is ObjectMissing else errno.EACCES if reason else errno.EIO
    return kind(code, f"{what} failed: {reason or f'the Hub answers {status}'}")


def _wait_asked_for(headers: Mapping[str, str]) -> float:
    """Seconds that the Hub wants to be left alone."""
    after = headers.get("Retry-After", "")
    found = _RESET.search(headers.get("RateLimit", ""))
    return float(after) if after.isdecimal() else float(found[1]) if found else 0.0


# ---- opening --------------------------------------------------------------------------------------------------------


def open_hub(repo: str, revision: str = "", subfolder: str = "", *, patience: Patience | None = None) -> Folder:
    """Open a model repository at the commit that a revision means now.

    Where the Hub cannot be reached, or `HF_HUB_OFFLINE` is set, the commit and the files are those of the library's
    cache, if a whole checkpoint is there.

    Args:
        repo: `organization/name`.
        revision: branch, tag or commit; empty for `main`.
        subfolder: a folder in the repository; empty for all.
        patience: how long a request is repeated.

    Raises:
        CheckpointInvalid: a name that no repository, revision or folder can have.
        ObjectMissing: there is no such repository or revision, or the cache lacks files of it.
        StorageFailed: access is denied.
        StorageUnavailable: the Hub cannot be reached, and the cache does not have the revision.
    """
    revision, subfolder = revision or constants.DEFAULT_REVISION, subfolder.strip("/")
    if not _REPO.fullmatch(repo) or not is_inside(revision) or (subfolder and not is_inside(subfolder)):
        message = "expected a repository as organization/name, a revision and a folder in it"
        raise refuse("location", message, file=_url(repo, revision, subfolder), way_out="check the names")
    patience = patience or Patience()
    unreachable = None
    if not constants.HF_HUB_OFFLINE:
        try:
            return _open_online(repo, revision, subfolder, patience)
        except StorageUnavailable as error:
            unreachable = error
    folder = _open_cached(repo, revision, subfolder, patience, unreachable)
    if unreachable is not None:
        log.warning("the Hub cannot be reached; reading %s from the local cache", folder.url)
    return folder


def _url(repo: str, revision: str, name: str) -> str:
    return f"hf://{repo}@{revision}" + (f"/{name}" if name else "")


def _fetch_hint(repo: str, revision: str) -> str:
    return f"run `hf download {repo} --revision {revision}` while the Hub can be reached"


def _open_online(repo: str, revision: str, subfolder: str, patience: Patience) -> HubFolder:
    info = _look_up(repo, revision, patience)
    commit = info.sha or ""
    if not COMMIT.fullmatch(commit):
        message = f"look up {show(_url(repo, revision, ''), 200)} failed: the Hub names no commit"
        raise StorageFailed(errno.EIO, message)
    modified = info.last_modified.timestamp() if info.last_modified else 0.0
    cache, files, cached = cached_files(repo, commit), dict[str, FileIdentity](), dict[str, CachedFile]()
    for sibling in info.siblings or []:
        name = _name_below(sibling.rfilename, subfolder)
        identity = _identify(repo, commit, sibling, modified)
        if not name or identity is None:
            continue
        found = cache.get(sibling.rfilename)
        if found is not None and _agrees(found, identity):
            cached[name] = found
            identity = replace(identity, digest=identity.digest or found.digest)
        files[name] = identity
    return HubFolder(repo, commit, subfolder, files, cached, patience=patience)


def _look_up(repo: str, revision: str, patience: Patience) -> ModelInfo:
    """What the Hub tells of a revision, each file included."""
    place = show(_url(repo, revision, ""), 200)

    def attempt(_: float) -> ModelInfo | Exception:
        with operation("look up", _url(repo, revision, "")):
            try:
                return HfApi(endpoint=constants.ENDPOINT).model_info(
                    repo, revision=revision, files_metadata=True, timeout=30
                )
            except HFValidationError:
                return refuse("location", "expected a repository as organization/name", file=repo)
            except OfflineModeIsEnabled:
                return StorageUnavailable(errno.ENETDOWN, f"look up {place} failed: HF_HUB_OFFLINE is set")
            except HfHubHTTPError as error:
                found = _typed(f"look up {place}", error.response.status_code, error.response.headers)
            except (KeyError, TypeError, ValueError):
                return StorageFailed(
                    errno.EIO, f"look up {place} failed: the reply is not the Hub's; check HF_ENDPOINT"
                )
            # raised out here, because the library's error holds the request, and with it the token
            if isinstance(found, _Passing):
                raise found
            return found

    result = _patiently(f"look up {place}", attempt, patience)
    if isinstance(result, Exception):
        raise result
    return result


def _name_below(name: str, subfolder: str) -> str:
    """The name of a file in the subfolder; empty if it is elsewhere, or would lead out."""
    prefix = f"{subfolder}/" if subfolder else ""
    return name.removeprefix(prefix) if is_inside(name) and name.startswith(prefix) else ""


def _identify(repo: str, commit: str, sibling: RepoSibling, modified: float) -> FileIdentity | None:
    """The identity of a file by what the Hub tells; None where that is not even a size."""
    blob = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or ""
    size = sibling.lfs.size if sibling.lfs else sibling.size
    if size is None:
        return None
    return FileIdentity(
        url=_url(repo, commit, sibling.rfilename),
        version=f"{commit}:{blob}",
        size=size,
        modified=modified,
        digest=Digest("sha256", sibling.lfs.sha256) if sibling.lfs else None,
    )


def _agrees(cached: CachedFile, identity: FileIdentity) -> bool:
    """Whether a cached file can be the one that the Hub tells of."""
    blob = identity.version.rpartition(":")[2]
    return cached.size == identity.size and (not cached.blob or not blob or cached.blob == blob)


def _open_cached(
    repo: str, revision: str, subfolder: str, patience: Patience, unreachable: StorageUnavailable | None
) -> HubFolder:
    commit = cached_commit(repo, revision)
    cache = cached_files(repo, commit) if commit else {}
    if commit is None or not cache:
        if unreachable is not None:
            raise unreachable
        place = show(_url(repo, revision, subfolder), 200)
        message = f"open {place} failed: HF_HUB_OFFLINE is set, and {repo_folder(repo)} does not have this revision"
        raise ObjectMissing(errno.ENOENT, f"{message}; {_fetch_hint(repo, revision)}")
    missing = missing_files(cache, subfolder)
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        message = f"open {show(_url(repo, commit, subfolder), 200)} failed: the local cache lacks {names}"
        raise ObjectMissing(errno.ENOENT, f"{message}; {_fetch_hint(repo, commit)}")
    cached = {name: file for full, file in cache.items() if (name := _name_below(full, subfolder))}
    files = {
        name: FileIdentity(
            url=_url(repo, commit, f"{subfolder}/{name}" if subfolder else name),
            version=f"{commit}:{file.blob}",
            size=file.size,
            digest=file.digest,
        )
        for name, file in cached.items()
    }
    return HubFolder(repo, commit, subfolder, files, cached, patience=patience, is_offline=True)
