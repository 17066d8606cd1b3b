"""Puts everything that shardmill needs on a Prefect server, and repairs it; `shardmill setup` starts this.

python -m shardmill.flows.setup [--files FOLDER | --export FOLDER] [--dry-run] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx

from shardmill.errors import DeploymentInvalid, Problem, Refused, ServerFailed, ShardmillError

SCHEMA: Final = 1
"""Of the JSON document."""
_ANSWER_LIMIT: Final = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up a server; returns the exit code of the command line."""
    chosen = _parse(arguments)
    try:
        if chosen.export is not None:
            return _export(chosen.export)
        return _set_up(chosen)
    except ShardmillError as error:
        problems = error.problems if isinstance(error, Refused) else ()
        lines = [f"refused: {len(problems)} found", *(f"  {problem}" for problem in problems)]
        sys.stderr.write("\n".join(lines if problems else [f"failed: {error}"]) + "\n")
        code = 2 if problems else 1
        if chosen.json:
            status = "refused" if problems else "failed"
            _print(_document(status, chosen) | {"message": str(error)})
        return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="shardmill setup",
        description="Put pools, deployments, limits and the automation for dead runs on the Prefect server of "
        "PREFECT_API_URL, or repair them. Again and again: what is right already is left alone.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--files", type=Path, metavar="FOLDER", help="files of your own instead of those of the release")
    which.add_argument("--export", type=Path, metavar="FOLDER", help="write the files of the release there, and stop")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return parser.parse_args(arguments)


def _export(folder: Path) -> int:
    from shardmill.orchestration.platform import export_files

    for file in export_files(folder):
        sys.stdout.write(f"{file}\n")
    sys.stdout.write("change them, then: shardmill setup --files " + str(folder) + "\n")
    return 0


def _set_up(chosen: argparse.Namespace) -> int:
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    from shardmill.orchestration.platform import packaged_folder, read_platform
    from shardmill.orchestration.provision import Change, Provision

    url = PREFECT_API_URL.value()
    if not url:
        way_out = "export PREFECT_API_URL=http://127.0.0.1:4200/api, after `prefect server start`"
        raise DeploymentInvalid([Problem(kind="server-unknown", message="no server is named", way_out=way_out)])
    platform = read_platform(chosen.files or packaged_folder())
    changes: list[Change] = []
    with _server_errors(url), get_client(sync_client=True) as client:
        for change in Provision(client, platform, is_trial=chosen.dry_run).changes():
            changes.append(change)
            if not chosen.json:
                sys.stdout.write(_line(change.document()) + "\n")
                sys.stdout.flush()
    counts = {action: sum(c.action == action for c in changes) for action in ("created", "updated", "unchanged")}
    if chosen.json:
        _print(
            _document("done", chosen) | {"server": url, "counts": counts, "changes": [c.document() for c in changes]}
        )
    else:
        told = ", ".join(f"{number} {action}" for action, number in counts.items())
        sys.stdout.write(f"{told}{'; dry run: nothing was changed' if chosen.dry_run else ''}\n")
    return 0


def _document(status: str, chosen: argparse.Namespace) -> dict[str, Any]:
    return {"command": "setup", "schema": SCHEMA, "status": status, "dry_run": chosen.dry_run}


def _print(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def _line(change: dict[str, Any]) -> str:
    from shardmill.orchestration.provision import Difference

    said = [str(Difference(**difference)) for difference in change["differences"]]
    if change["note"]:
        said.append(f"({change['note']})")
    return f"{change['kind']:<11} {change['name']:<38} {change['action']:<10} {'; '.join(said)}".rstrip()


@contextmanager
def _server_errors(url: str) -> Iterator[None]:
    """Say in words what the server says in numbers."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        status, answer = error.response.status_code, error.response.text[:_ANSWER_LIMIT]
        if status in (401, 403):
            message = f"{url} does not let us in ({status}); set PREFECT_API_AUTH_STRING to what the server was given"
            raise ServerFailed(message) from error
        raise ServerFailed(f"{url} answered {status}: {answer}") from error
    except httpx.HTTPError as error:
        message = (
            f"no server answers at {url}: {error or type(error).__name__}; is it started, and PREFECT_API_URL right?"
        )
        raise ServerFailed(message) from error


if __name__ == "__main__":
    sys.exit(main())
