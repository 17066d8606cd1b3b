"""The files that `report` and `run` write on request: page, model card, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from shardmill.cli.arguments import Options
from shardmill.cli.console import Console, print_result
from shardmill.cli.failures import DONE
from shardmill.core.summary import render, summarize_manifest
from shardmill.errors import show
from shardmill.storage.documents import check_document, write_document

if TYPE_CHECKING:
    from shardmill.core.report import Report
    from shardmill.stages.result import VerifyWatch

_WRITTEN: Final = ("html", "card", "parquet", "json_file")


def asked_for(options: Options) -> dict[str, str]:
    """Location of every file that was asked for, by option."""
    return {name: location for name in _WRITTEN if (location := getattr(options, name))}


def check_documents(options: Options) -> None:
    """Refuse at once what could not be written in the end.

    Raises:
        DestinationInvalid: a file cannot be written, or a model card of somebody else lies there.
        RecipeInvalid: a library is missing.
    """
    wanted = asked_for(options)
    for name, location in wanted.items():
        if name == "card":
            from shardmill.pages.card import MARK  # Jinja takes a moment to import

            check_document(location, replaces=MARK.encode())
        else:
            check_document(location)
    if "parquet" in wanted:
        from shardmill.pages.tables import check_parquet

        check_parquet()


def report(options: Options, console: Console) -> int:
    """Show the summary of a finished result, or write a page, a card or tables of it."""
    from shardmill.stages.report import make_report

    check_documents(options)
    if not asked_for(options):
        from shardmill.stages.result import INTAKE, read_manifest
        from shardmill.storage.source import open_source

        manifest = read_manifest(open_source(options.destination, INTAKE))
        console.say(f"plan {show(manifest.plan[:16])[1:-1]} of {show(options.destination, 200)}")
        print_result(render(summarize_manifest(manifest)))
        return DONE
    found = make_report(
        options.destination,
        source=options.against or "",
        base_model=options.base_model,
        with_histograms=bool(options.against),
        watch=_watch(console),
    )
    console.close_progress()
    for line in write_documents(found, options):
        print_result(line)
    return DONE


def _watch(console: Console) -> VerifyWatch:
    from shardmill.stages.result import VerifyWatch

    def on_total(size: int) -> None:
        console.progress("histograms", size)

    return VerifyWatch(on_total=on_total, on_bytes=console.count_bytes)


def write_documents(found: Report, options: Options) -> Iterator[str]:
    """Write every file that was asked for, and say so line by line.

    Raises:
        StorageFailed: the storage refuses.
    """
    for name, location in asked_for(options).items():
        data = _WRITERS[name](found)
        write_document(location, data)
        yield f"{show(location, 200)}: {len(data):,} bytes"


def _html(found: Report) -> bytes:
    from shardmill.pages.page import render_page

    return render_page(found).encode()


def _card(found: Report) -> bytes:
    from shardmill.pages.card import render_card

    return render_card(found).encode()


def _parquet(found: Report) -> bytes:
    from shardmill.pages.tables import to_parquet

    return to_parquet(found)


def _json(found: Report) -> bytes:
    from shardmill.pages.tables import to_json

    return to_json(found)


_WRITERS: Final[dict[str, Callable[[Report], bytes]]] = {
    "html": _html,
    "card": _card,
    "parquet": _parquet,
    "json_file": _json,
}
