"""What may be asked for on the command line, and the recipe that follows from it."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from shardmill import __version__
from shardmill.core.budget import DEFAULT_CANDIDATES, Wish, parse_budget, parse_candidates
from shardmill.core.limits import NAMES, Intake, Limits
from shardmill.core.recipe import EXPERT_LAYOUTS, INDIVISIBLE, Recipe, parse_recipe, uniform, with_search
from shardmill.core.scheme import SEARCHES, parse_search
from shardmill.core.strict_json import parse_json
from shardmill.errors import Problem, RecipeInvalid, Refused

DEFAULT_SCHEME: Final = "FP8_DYNAMIC"
STORE_VARIABLE: Final = "SHARDMILL_STORE"
APART: Final = {
    "demo": "quantize a small real model from end to end",
    "setup": "put pools, deployments and limits on a Prefect server, or repair them",
    "worker": "work on the runs of a Prefect server, one at a time or one for each device",
}
"""Commands that run in a process of their own, since they need libraries that nothing else here does."""
_RECIPE_LIMIT: Final = 4_000_000
_DESCRIPTION: Final = "Quantize sharded safetensors checkpoints, shard by shard, without a model definition."
_EPILOG: Final = """\
exit codes: 0 done; 2 the input or the request is refused, every problem is listed; 130 stopped by Ctrl-C; 1 anything
else. `run` again with the same arguments goes on where it stopped. SHARDMILL_STORE is the default of --store.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of one call; fields that a command does not have keep their defaults."""

    command: str
    source: str = ""
    destination: str = ""
    scheme: str | None = None
    schemes: tuple[str, ...] = ()
    """All that were asked for; `scheme` is the one of one conversion."""
    recipe: str | None = None
    group_size: int | None = None
    ignore: tuple[str, ...] = ()
    default_ignores: bool | None = None
    indivisible: str | None = None
    expert_layout: str | None = None
    partial_fused: bool | None = None
    limit: tuple[str, ...] = ()
    allow_code: bool = False
    allow_nonfinite: bool | None = None
    dequantize: bool = False
    budget: str | None = None
    candidates: str | None = None
    write_recipe: str | None = None
    store: str = ""
    device: str = "auto"
    workers: int = 0
    search: str | None = None
    search_norm: float | None = None
    importance: str | None = None
    input_scale: str | None = None
    verify: str = "fast"
    dry_run: bool = False
    against: str | None = None
    reproduce: tuple[str, ...] = ()
    sha256: str | None = None
    tp: int = 1
    """Ranks that an engine is to share every layer among."""
    html: str | None = None
    card: str | None = None
    parquet: str | None = None
    json_file: str | None = None
    base_model: str = ""
    older_than: float = 24.0
    """Hours."""
    rest: tuple[str, ...] = ()
    """Arguments of a command that runs in a process of its own."""
    json: bool = False
    debug: bool = False
    verbosity: int = 0
    """-1 quiet, 0 usual, 1 and more: tell more."""


_SOURCE: Final = "folder with safetensors shards and config.json: a path, s3://, or hf://org/repo@revision"


def parse_arguments(argv: Sequence[str]) -> Options:
    """Read the command line; exits with code 2 and a usage line when it cannot be read."""
    parser = _build_parser()
    namespace, rest = parser.parse_known_args(list(argv))
    values = vars(namespace)
    quiet, verbose = values.pop("quiet", False), values.pop("verbose", 0)
    if values["command"] == "store":
        values["command"] = f"store {values.pop('action')}"
    if values["command"] in APART:
        values["rest"] = tuple(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {shlex.join(rest)}")
    for name in ("ignore", "limit", "reproduce", "schemes"):
        values[name] = tuple(values.get(name) or ())
    if len(values["schemes"]) == 1:
        values["scheme"] = values["schemes"][0]
    return Options(**values, verbosity=-1 if quiet else verbose)


def _build_parser() -> argparse.ArgumentParser:
    common = _common()
    parser = argparse.ArgumentParser(
        prog="shardmill",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"shardmill {__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="command")

    def verb(name: str, summary: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=summary, description=summary, parents=[common], allow_abbrev=False)

    plan = verb("plan", "show what would be done to every tensor, exact sizes included; reads headers only")
    plan.add_argument("source", metavar="SRC", help=_SOURCE)
    _add_recipe(plan)
    kept = "with --budget: where measured errors are kept (default: .shardmill in this folder)"
    _add_store_location(plan.add_argument, kept)
    plan.add_argument("--device", default="auto", help="with --budget: as `run` has it (default: auto)")
    _add_intake(plan)
    _add_serving(plan)
    _add_json(plan)
    _add_run(verb("run", "quantize a checkpoint; run again to go on after a stop"))
    check = verb("verify", "read a finished result back and check everything in it")
    check.add_argument("destination", metavar="DST", help="finished result")
    check.add_argument("--against", metavar="SRC", help="compare every tensor with the source, too")
    check.add_argument(
        "--reproduce",
        metavar="TENSOR",
        action="append",
        help="make this tensor again from SRC and compare the bytes, and do nothing else; may be repeated",
    )
    check.add_argument(
        "--sha256", metavar="FILE", help="write the SHA-256 of every file as sha256sum does, if no problem is found"
    )
    _add_serving(check)
    _add_json(check)
    _add_report(verb("report", "show the summary of a finished result, or write a page, a model card or tables of it"))
    _add_store(verb("store", "look after the store of finished shards"))
    for name, summary in APART.items():
        verbs.add_parser(name, help=summary, add_help=False, allow_abbrev=False)
    return parser


def _common() -> argparse.ArgumentParser:
    """Options of every command, before or after its name."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = common.add_argument_group("talk")
    group.add_argument("-v", "--verbose", action="count", help="tell more on stderr")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress, only errors on stderr")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return common


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    summary = "warn of what an engine would refuse with this --tensor-parallel-size (default: 1)"
    parser.add_argument("--tp", type=_positive, default=1, metavar="N", help=summary)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is quantized how")
    choice = group.add_mutually_exclusive_group()
    what = (
        f"a preset such as W4A16 or NVFP4A16 (default: {DEFAULT_SCHEME}); may be repeated: run writes a result for each"
        " in DST/SCHEME, or where DST says {scheme}, from one read of SRC"
    )
    choice.add_argument("--scheme", dest="schemes", metavar="SCHEME", action="append", help=what)
    choice.add_argument("--recipe", metavar="FILE", help="a recipe in JSON or YAML")
    choice.add_argument(
        "--dequantize", action="store_true", help="write a plain BF16 checkpoint from one that is quantized"
    )
    choice.add_argument(
        "--budget",
        metavar="SIZE",
        help="choose among candidates for each layer, so that the error is the least within a size: 4.5bpw (bits per"
        " weight of all tensors), 4.5bpw-quantized (of quantized weights alone) or 12GB (of all shards); reads SRC once"
        " more to measure what candidates leave",
    )
    group.add_argument(
        "--candidates",
        metavar="A,B,...",
        help="with --budget: presets to choose among, with another group size behind a colon, such as W4A16:64"
        f" (default: {','.join(DEFAULT_CANDIDATES)})",
    )
    group.add_argument(
        "--write-recipe", metavar="FILE", help="with --budget: write what was chosen as a recipe in YAML, to be edited"
    )
    group.add_argument("--group-size", type=_positive, metavar="N", help="input features that share a scale")
    group.add_argument(
        "--ignore",
        action="append",
        metavar="PATTERN",
        help="module that stays as it is: a full name, or re: and an expression; may be repeated",
    )
    group.add_argument(
        "--search",
        choices=SEARCHES,
        help="how scales are chosen: from the extremes of what shares one, or by the least error of what is read back,"
        " which takes longer (default: none, or what the recipe says)",
    )
    group.add_argument(
        "--search-norm",
        type=float,
        metavar="P",
        help="with --search mse: the power by which errors count, 1 to 4 in halves (default: 2)",
    )
    group.add_argument(
        "--importance",
        metavar="FILE",
        help="with --search mse: a safetensors file with a float32 tensor [in] for each module, by which errors in its"
        " input features are multiplied, such as their mean squares in a calibration run",
    )
    group.add_argument(
        "--input-scale",
        metavar="POLICY",
        help="for NVFP4, which stores a global scale of activations, too: constant:V assumes that none exceeds V, a"
        " proxy for calibration that clips what does; donor:LOCATION takes the scales of a calibrated NVFP4"
        " checkpoint of the same architecture (compressed-tensors or ModelOpt; a path, s3:// or hf://)",
    )
    group.add_argument(
        "--no-default-ignores",
        dest="default_ignores",
        action="store_false",
        default=None,
        help="quantize embeddings, heads, routers and the like, too",
    )
    group.add_argument(
        "--indivisible", choices=INDIVISIBLE, help="weights whose width is no multiple of the group size"
    )
    group.add_argument("--expert-layout", choices=EXPERT_LAYOUTS, help="layout of fused expert stacks")
    group.add_argument(
        "--partial-fused",
        action="store_true",
        default=None,
        help="allow that members of a fused set are treated differently",
    )
    group.add_argument(
        "--allow-nonfinite",
        action="store_true",
        default=None,
        help="copy weights that hold NaN or Inf, and what engines fuse with them, instead of refusing the run;"
        " reads the source once more",
    )


def _add_intake(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is taken in of the source")
    group.add_argument(
        "--limit",
        action="append",
        metavar="NAME=VALUE",
        help=f"raise a limit, such as header_bytes=50MB; may be repeated. Limits: {', '.join(NAMES)}",
    )
    group.add_argument(
        "--allow-code",
        action="store_true",
        help="copy code, pickles and dot files, too, and keep `auto_map` in configs",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=_SOURCE)
    parser.add_argument("destination", metavar="DST", help="nothing yet, or an empty folder: a path, or s3://")
    _add_recipe(parser)
    _add_intake(parser)
    group = parser.add_argument_group("how the run works; none of it changes bytes")
    kept = "where finished shards are kept: a path, or s3:// (default: .shardmill beside DST)"
    _add_store_location(group.add_argument, kept)
    group.add_argument("--device", default="auto", help="auto, cpu, or a list such as cuda:0,cuda:1 (default: auto)")
    shards = "shards in work at a time on the CPU, whose cores share their row blocks (default: by cores)"
    group.add_argument("--workers", type=_positive, default=0, metavar="N", help=shards)
    group.add_argument(
        "--verify", choices=("fast", "full"), default="fast", help="how finished shards are checked (default: fast)"
    )
    group.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    _add_documents(parser)
    _add_json(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", metavar="DST", help="finished result")
    _add_documents(parser)
    parser.add_argument(
        "--json", dest="json_file", metavar="FILE", help="write all figures as JSON, a row for every tensor"
    )
    parser.add_argument("--parquet", metavar="FILE", help="write a row for every tensor; needs the extra `parquet`")
    against = "the source: its values give the histograms of the worst weights, its location the command"
    parser.add_argument("--against", metavar="SRC", help=against)


def _add_documents(parser: argparse.ArgumentParser) -> None:
    """Files for people; a path, or s3://."""
    group = parser.add_argument_group("what is written beside the result; a path, or s3://")
    group.add_argument("--html", metavar="FILE", help="a page with pictures, in one file that needs no network")
    group.add_argument(
        "--card", metavar="FILE", help="a model card for the Hub; replaces no file but one that shardmill wrote"
    )
    group.add_argument(
        "--base-model", metavar="ORG/NAME", default="", help="the source on the Hub (default: by SRC or config.json)"
    )


def _add_store(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|gc|verify")
    for name, summary in [
        ("ls", "list finished shards"),
        ("gc", "delete finished shards that no result on this file system uses"),
        ("verify", "read every finished shard and compare it with its receipt"),
    ]:
        action = actions.add_parser(name, help=summary, description=summary, parents=[_common()], allow_abbrev=False)
        _add_store_location(action.add_argument, "the store (default: .shardmill in this folder)")
        if name == "gc":
            action.add_argument("--older-than", type=_hours, default=24.0, metavar="HOURS", help="default: 24")


def _add_store_location(add_argument: Callable[..., Any], summary: str) -> None:
    add_argument("--store", metavar="URL", default=os.environ.get(STORE_VARIABLE, ""), help=summary)


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above zero, found {text!r}")
    return number


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not hours >= 0:
        raise argparse.ArgumentTypeError(f"expected hours, found {text!r}")
    return hours


def read_intake(options: Options) -> Intake:
    """Tell what the options let in of a source.

    Raises:
        RecipeInvalid: no such limit, or no such value.
    """
    return Intake(limits=Limits.parse(options.limit), allow_code=options.allow_code)


def read_recipe(options: Options) -> Recipe:
    """Build the recipe that the options ask for.

    Raises:
        RecipeInvalid: unknown scheme, unreadable file, options that do not go together.
    """
    if options.budget is not None:
        if options.input_scale is not None:
            raise _invalid("--input-scale does not go with --budget: no candidate quantizes to NVFP4")
        return read_wish(options, options.budget).base
    for option, value in (("--candidates", options.candidates), ("--write-recipe", options.write_recipe)):
        if value is not None:
            raise _invalid(f"{option} goes with --budget")
    if options.dequantize:
        asked: Any = {"dequantize": True} | ({"group_size": options.group_size} if options.group_size else {})
    elif options.recipe is None:
        asked = {"scheme": options.scheme or DEFAULT_SCHEME, "group_size": options.group_size}
    elif options.group_size is not None:
        raise _invalid("--group-size does not go with --recipe", "set group_size in the file")
    else:
        asked = _read_recipe_file(Path(options.recipe))
    if options.input_scale is not None and isinstance(asked, Mapping):
        asked = {**asked, "input_scale": options.input_scale}
    return _completed(parse_recipe(asked), options)


def read_wish(options: Options, budget: str) -> Wish:
    """What is asked for where a size is given instead of a scheme.

    Raises:
        RecipeInvalid: an unknown candidate, or no such size.
    """
    names = DEFAULT_CANDIDATES if options.candidates is None else options.candidates.split(",")
    recipes = [_completed(uniform(s), options) for s in parse_candidates(names, options.group_size)]
    candidates = tuple(recipe.groups[0].scheme for recipe in recipes)
    return Wish(budget=parse_budget(budget), candidates=candidates, base=recipes[0])


def _completed(recipe: Recipe, options: Options) -> Recipe:
    """A recipe with what options say beside the scheme."""
    changes: dict[str, Any] = {
        name: value
        for name in ("default_ignores", "indivisible", "expert_layout", "partial_fused", "allow_nonfinite")
        if (value := getattr(options, name)) is not None
    }
    recipe = _searched(recipe, options)
    return replace(recipe, ignore=tuple(dict.fromkeys((*recipe.ignore, *options.ignore))), **changes)


def _searched(recipe: Recipe, options: Options) -> Recipe:
    for option, value in (("--search-norm", options.search_norm), ("--importance", options.importance)):
        if value is not None and options.search != "mse":
            raise _invalid(f"{option} goes with --search mse")
    if options.search is None:
        return recipe
    asked = {"kind": options.search, "norm": options.search_norm, "importance_file": options.importance}
    return with_search(recipe, parse_search({name: value for name, value in asked.items() if value is not None}))


def _invalid(message: str, way_out: str = "", file: str = "") -> RecipeInvalid:
    return RecipeInvalid([Problem(file=file, kind="recipe", message=message, way_out=way_out)])


def _read_recipe_file(path: Path) -> Any:
    try:
        if path.stat().st_size > _RECIPE_LIMIT:
            raise _invalid(f"a recipe has at most {_RECIPE_LIMIT} bytes", file=str(path))
        data = path.read_bytes()
    except OSError as error:
        raise _invalid(f"the recipe cannot be read: {error.strerror}", file=str(path)) from error
    if path.suffix == ".json":
        try:
            return parse_json(data, file=str(path), kind="recipe")
        except Refused as error:
            raise RecipeInvalid(error.problems) from error
    if path.suffix in (".yaml", ".yml"):
        return _parse_yaml(data, path)
    raise _invalid("expected a file that ends in .json, .yaml or .yml", file=str(path))


def _parse_yaml(data: bytes, path: Path) -> Any:
    import yaml  # few recipes are YAML

    try:
        return yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        summary = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _invalid(f"not valid YAML: {summary}", file=str(path)) from error
