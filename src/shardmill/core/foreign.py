"""What becomes of the files of a foreign checkpoint beside its shards: copied by an allow-list, or left out, and why.

Code never crosses by accident: files that are code or can run code, and references to such files, only on demand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardmill.errors import Problem, show

AUTO_MAP: Final = "auto_map"
"""Key under which configs name Python code that a loader fetches and runs."""
CODE: Final = "code"
PICKLE: Final = "a pickle, which can run code"
HIDDEN: Final = "a dot file"
WEIGHTS: Final = "a weight file that the index does not name"
INDEX: Final = "an index beside the one that counts"
UNLISTED: Final = "not on the list of files that are copied"
ON_DEMAND: Final = frozenset({CODE, PICKLE, HIDDEN})
"""What `allow_code` copies."""
_NAMES: Final = frozenset(
    [
        "config.json",
        "generation_config.json",
        "params.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "tekken.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "preprocessor_config.json",
        "processor_config.json",
        "image_processor_config.json",
        "video_preprocessor_config.json",
        "chat_template.json",
        "chat_template.jinja",
    ]
)
_PREFIXES: Final = ("license", "readme", "notice", "tokenizer.model.")
_SUFFIXES: Final = (".jinja",)
_WEIGHTS: Final = (".safetensors", ".gguf", ".ggml", ".h5", ".hdf5", ".msgpack", ".onnx", ".tflite", ".pb")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz", ".mar")
_CODE: Final = (
    *(".py", ".pyc", ".pyd", ".pyi", ".pyx", ".ipynb", ".sh", ".bash", ".bat", ".cmd", ".ps1", ".js", ".mjs", ".ts"),
    *(".so", ".dll", ".dylib", ".exe", ".jar", ".class", ".wasm", ".whl", ".rb", ".pl", ".lua", ".cu", ".c", ".cpp"),
)
_SHOWN: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """The files beside the shards."""

    copied: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    """`(file, reason)`."""
    warnings: tuple[Problem, ...]


def reason_against(name: str) -> str:
    """Why a file is not simply copied; empty where it is.

    >>> reason_against("tokenizer.json"), reason_against("modeling_x.py"), reason_against(".git/config")
    ('', 'code', 'a dot file')
    """
    parts = name.lower().split("/")
    base = parts[-1]
    if any(part.startswith(".") for part in parts):
        return HIDDEN
    for reason, suffixes in ((CODE, _CODE), (PICKLE, _PICKLES), (WEIGHTS, _WEIGHTS)):
        if base.endswith(suffixes):
            return reason
    if ".safetensors." in base:
        return INDEX if base.endswith(".index.json") else WEIGHTS
    is_listed = base in _NAMES or base.startswith(_PREFIXES) or base.endswith(_SUFFIXES)
    return "" if is_listed else UNLISTED


def sort_files(
    names: Iterable[str], *, odd: Mapping[str, str] = {}, hidden: Iterable[str] = (), allow_code: bool = False
) -> Sorted:
    """Decide about every file beside the shards, and warn of what is not copied, and of code that is.

    Args:
        odd: reason by name, of links that lead outside and of what is no file; for those that nobody needs.
        hidden: folders that were not looked into.
    """
    copied: list[str] = []
    left_out: list[tuple[str, str]] = [(f"{name}/", HIDDEN) for name in hidden]
    with_code: list[tuple[str, str]] = []
    for name in names:
        reason = reason_against(name)
        if not reason or (allow_code and reason in ON_DEMAND and name not in odd):
            copied.append(name)
            with_code += [(name, reason)] if reason else []
        else:
            left_out.append((name, odd.get(name, reason)))
    found = Sorted(copied=tuple(copied), left_out=tuple(sorted(left_out)), warnings=())
    warnings = (*_fold(found.left_out, "left-out", "left out"), *_fold(with_code, "copied", "copied on demand"))
    return Sorted(copied=found.copied, left_out=found.left_out, warnings=warnings)


_KINDS: Final = {CODE: "code", PICKLE: "pickle", HIDDEN: "dot-file", WEIGHTS: "weight-file", INDEX: "index"}


def _fold(files: Iterable[tuple[str, str]], kind: str, what: str) -> Iterator[Problem]:
    """One warning for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in files:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f"; so {'is' if len(names) == 2 else 'are'} {_some(names[1:])}" if len(names) > 1 else ""
        way_out = "--allow-code copies such files" if reason in ON_DEMAND and kind == "left-out" else ""
        message = f"{reason}; {what}{more}"
        yield Problem(file=names[0], kind=f"{_KINDS.get(reason, 'file')}-{kind}", message=message, way_out=way_out)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(show(name, 40) for name in names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def levels(document: Any) -> Iterator[Mapping[str, Any]]:
    """Every object of a JSON document, at whatever depth.

    >>> len(list(levels({"a": [{"b": {}}], "c": 1})))
    3
    """
    if isinstance(document, Mapping):
        yield document
        for value in document.values():
            yield from levels(value)
    elif isinstance(document, list):
        for value in document:
            yield from levels(value)


def without(document: Any, keys: Iterable[str]) -> Any:
    """A JSON document without some keys of its objects, at whatever depth.

    >>> without({"a": [{"auto_map": 1, "b": 2}]}, ["auto_map"])
    {'a': [{'b': 2}]}
    """
    gone = frozenset(keys)
    if isinstance(document, Mapping):
        return {key: without(value, gone) for key, value in document.items() if key not in gone}
    return [without(value, gone) for value in document] if isinstance(document, list) else document


def names_code(document: Any) -> bool:
    """Whether a JSON document refers to code anywhere."""
    return any(AUTO_MAP in level for level in levels(document))


def without_code(document: Any) -> str:
    """Text of a JSON document without what refers to code."""
    return json.dumps(without(document, [AUTO_MAP]), indent=2, ensure_ascii=False) + "\n"


def is_config(name: str) -> bool:
    """Whether a copied file is a config that loaders search for references to code.

    >>> is_config("tokenizer_config.json"), is_config("tokenizer.json")
    (True, False)
    """
    return name.rpartition("/")[2].lower().endswith("config.json")


def code_removed(name: str, *, is_kept: bool) -> Problem:
    """The warning about a reference to code."""
    if is_kept:
        return Problem(file=name, kind="auto-map-kept", message="`auto_map` names code that loaders may run; kept")
    message = "`auto_map` is removed: it names code that loaders would fetch and run"
    return Problem(file=name, kind="auto-map-removed", message=message, way_out="--allow-code keeps it")
