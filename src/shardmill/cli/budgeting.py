"""`--budget`: a recipe that keeps to a size, found before `plan` or `run` goes on with it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from shardmill.cli.arguments import Options, read_wish
from shardmill.cli.console import Console, print_result
from shardmill.core.budget_recipe import MARK, render_solution, solution_document, write_recipe
from shardmill.core.recipe import Recipe
from shardmill.errors import Problem, RecipeInvalid, Refused, show
from shardmill.storage.documents import check_document, write_document

if TYPE_CHECKING:
    from shardmill.stages.plan import Locations
    from shardmill.storage.source import SourceFolder
    from shardmill.storage.store import Store

_ENDINGS: Final = (".yaml", ".yml")


def solve_plan(source: SourceFolder, options: Options, budget: str, console: Console) -> tuple[Recipe, dict[str, Any]]:
    """Find the recipe for `plan`; returns it, and what a document tells of it.

    Raises:
        Refused: an option cannot be met, something stands against a candidate, or the budget is out of reach.
    """
    from shardmill.cli.running import stop_on_interrupt
    from shardmill.stages.devices import check_devices
    from shardmill.storage.location import open_folder
    from shardmill.storage.store import FOLDER_NAME, Store

    if unavailable := check_devices(options.device):
        raise Refused(unavailable)
    store, stop = Store(open_folder(options.store or FOLDER_NAME)), threading.Event()
    with stop_on_interrupt(stop):
        return _solve(source, store, options, budget, console, stop)


def solve_run(
    locations: Locations, options: Options, budget: str, console: Console, stop: threading.Event
) -> tuple[Locations, Recipe, dict[str, Any]]:
    """Find the recipe for `run`; returns where to go on with it, the recipe, and what a document tells of it.

    Raises:
        Refused: as `solve_plan`, or source, destination or store cannot be used.
    """
    from shardmill.stages.validate import check_places, pin_readable, refuse_problems

    store = locations.open_store(options.verify)
    pinned = pin_readable(locations, store)
    refuse_problems(check_places(pinned, store))
    return pinned, *_solve(pinned.open_source(), store, options, budget, console, stop)


def _solve(
    source: SourceFolder, store: Store, options: Options, budget: str, console: Console, stop: threading.Event
) -> tuple[Recipe, dict[str, Any]]:
    from shardmill.stages.budget import MeasureWatch, solve_budget
    from shardmill.stages.pipeline import RunOptions

    _check_file(options)

    def on_total(size: int) -> None:
        console.progress("measure", size)

    watch = MeasureWatch(on_total=on_total, on_bytes=console.count_bytes)
    how = RunOptions(device=options.device, workers=options.workers, verify=options.verify)
    found = solve_budget(source, store, read_wish(options, budget), how, watch, stop)
    console.close_progress()
    if not options.json:
        print_result("\n".join([*render_solution(found.solution), ""]))
    if options.write_recipe is not None:
        data = write_recipe(found.recipe, found.solution).encode()
        write_document(options.write_recipe, data)
        console.say(f"{show(options.write_recipe, 200)}: {len(data):,} bytes")
    return found.recipe, {"budget": solution_document(found.solution)}


def _check_file(options: Options) -> None:
    """Refuse at once what could not be written in the end, or not be read as a recipe.

    Raises:
        RecipeInvalid: the name does not tell that it is YAML.
        DestinationInvalid: the file cannot be written.
    """
    if options.write_recipe is None:
        return
    if not options.write_recipe.endswith(_ENDINGS):
        message = "expected the name of a recipe to end in .yaml or .yml"
        raise RecipeInvalid([Problem(file=options.write_recipe, kind="recipe", message=message)])
    check_document(options.write_recipe, replaces=MARK.encode())
