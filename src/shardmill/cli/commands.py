"""Every command by name, and the small ones: a function prints its result on stdout and returns the exit code."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from shardmill.cli.arguments import APART, Options
from shardmill.cli.console import Console, print_result
from shardmill.cli.documents import report
from shardmill.cli.failures import DONE, FAILED, count, problem_lines
from shardmill.cli.planning import plan
from shardmill.cli.running import run
from shardmill.cli.verifying import verify
from shardmill.core.summary import human_bytes
from shardmill.errors import refuse

if TYPE_CHECKING:
    from shardmill.storage.store import Store


def _open_store(options: Options) -> Store:
    """The store that was named, or the one in this folder.

    Raises:
        CheckpointInvalid: there is none.
    """
    from shardmill.storage.location import open_folder
    from shardmill.storage.store import FOLDER_NAME, Store

    store = Store(open_folder(options.store or FOLDER_NAME))
    if not store.exists():
        raise refuse("store-missing", "expected a store, found none", file=store.folder.url, way_out="set --store")
    return store


def store_ls(options: Options, _console: Console) -> int:
    """List the finished shards of a store."""
    entries = list(_open_store(options).entries())
    for entry in entries:
        moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified))
        use = "in use" if entry.is_published else ""
        print_result(f"{entry.key[:16]}  {human_bytes(entry.size):>10}  {moment}  {use}".rstrip())
    print_result(f"{count(len(entries), 'shard')}, {human_bytes(sum(entry.size for entry in entries))}")
    return DONE


def store_gc(options: Options, _console: Console) -> int:
    """Delete the finished shards that are old and that no result is made of."""
    from shardmill.storage.publish import forget_gone

    store = _open_store(options)
    forget_gone(store)
    removed = store.collect(older_than=options.older_than * 3600)
    print_result(f"{count(len(removed), 'shard')} removed, {human_bytes(sum(entry.size for entry in removed))}")
    return DONE


def store_verify(options: Options, console: Console) -> int:
    """Read every finished shard and compare it with its receipt."""
    problems = _open_store(options).verify()
    print_result(f"{count(len(problems), 'problem')} found")
    for line in problem_lines(problems):
        console.error(line)
    return FAILED if problems else DONE


def apart(options: Options, _console: Console) -> int:
    """Become a process of the module of that name: signals reach it, and it needs libraries that nothing else does."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-P", "-m", f"shardmill.flows.{options.command}", *options.rest]
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter and the user's arguments


COMMANDS: Final[Mapping[str, Callable[[Options, Console], int]]] = {
    "plan": plan,
    "run": run,
    "verify": verify,
    "report": report,
    "store ls": store_ls,
    "store gc": store_gc,
    "store verify": store_verify,
    **dict.fromkeys(APART, apart),
}
