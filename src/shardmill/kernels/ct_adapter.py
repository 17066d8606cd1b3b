"""The one seam to compressed-tensors: its schemes, its config and its decompression.

Importing this module imports that library, which costs seconds; so import it where it is needed, not at the top. No
argument is changed: the library's objects are read through copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from pydantic import ValidationError
from torch import Tensor

from shardmill.core.scheme import OWN_FIELDS, Scheme, parse_scheme, preset, scheme_to_json
from shardmill.errors import Problem, RecipeInvalid, show

_NOT_READ: Final = frozenset({"version", "transform_config", "sparsity_config"})
"""Keys of a `quantization_config` that other readers use and `QuantizationConfig` drops."""

_LOCAL_OBSERVER: Final = "static_minmax"
"""What the library's preset NVFP4 names for calibration; nobody who only loads a checkpoint reads it."""


def scheme_from_ct(scheme: QuantizationScheme | str) -> Scheme:
    """Describe a scheme of compressed-tensors, or one of its presets by name, in our terms.

    Raises:
        RecipeInvalid: it needs calibration data, has no format, or asks for a format that its arguments do not give.
    """
    if isinstance(scheme, str):
        preset(scheme)  # refuses with the reason
        named = {"preset": scheme.upper()}
        return parse_scheme(_to_json(preset_name_to_scheme(scheme, ["Linear"])) | named)
    data = _to_json(scheme)
    found = parse_scheme(data)
    _refuse_what_parsing_drops(data, found)
    return found


def _to_json(scheme: QuantizationScheme) -> dict[str, Any]:
    """Dump a scheme without the fields that are not set."""
    data: dict[str, Any] = scheme.model_dump(mode="json", exclude_none=True)
    return data


def _refuse_what_parsing_drops(data: Mapping[str, Any], found: Scheme) -> None:
    messages = [
        f"observer_kwargs of {role} have no effect: only min/max is available"
        for role in ("weights", "input_activations")
        if data.get(role, {}).get("observer_kwargs")
    ]
    if data.get("format", found.format) != found.format:
        messages.append(f"format {show(data['format'])} does not fit the scheme, which gives {show(found.format)}")
    zp_dtype = data["weights"].get("zp_dtype", "torch.int8")
    if not found.weights.symmetric and zp_dtype != "torch.int8":
        messages.append(f"zp_dtype of weights must be torch.int8, found {show(zp_dtype)}")
    if messages:
        raise RecipeInvalid([Problem(kind="scheme", message=message) for message in messages])


def scheme_to_ct(scheme: Scheme, targets: Sequence[str]) -> QuantizationScheme:
    """Build the object of compressed-tensors that means the same, for modules that match `targets`."""
    data = scheme_to_json(scheme)
    for own in OWN_FIELDS:
        data.pop(own, None)
    for args in filter(None, data.values()):
        if args.get("scale_dtype") == "torch.uint8":
            args["zp_dtype"] = "torch.uint8"
    if scheme.needs_input_scale:
        data["input_activations"]["observer"] = _LOCAL_OBSERVER
    return QuantizationScheme.model_validate(data | {"targets": list(targets)})


def check_config(config: Mapping[str, Any]) -> list[str]:
    """Return what compressed-tensors would not read from a `quantization_config` as written; empty if all is well."""
    try:
        read = QuantizationConfig.model_validate(deepcopy(dict(config))).model_dump(mode="json")
    except ValidationError as error:
        return sorted(f"{_place(entry['loc'])}: {entry['msg']}" for entry in error.errors())
    except (KeyError, NotImplementedError, TypeError) as error:
        return [f"compressed-tensors cannot read it: {error}"]
    return sorted(_differences("", {key: value for key, value in config.items() if key not in _NOT_READ}, read))


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "quantization_config"


def _differences(place: str, written: Any, read: Any) -> Iterator[str]:
    if isinstance(written, Mapping) and isinstance(read, Mapping):
        for key, value in written.items():
            below = f"{place}.{key}" if place else str(key)
            if key in read:
                yield from _differences(below, value, read[key])
            else:
                yield f"{below}: unknown to compressed-tensors"
    elif written != read or isinstance(written, bool) != isinstance(read, bool):
        yield f"{place}: written as {written!r}, read as {read!r}"


def decompress(tensors: Mapping[str, Tensor], group: Mapping[str, Any]) -> Tensor:
    """Dequantize one module as compressed-tensors does, in the dtype of its choice.

    Args:
        tensors: stored tensors by param name.
        group: the entry of `config_groups` that covers the module.
    """
    scheme = QuantizationScheme.model_validate(deepcopy(dict(group)) | {"targets": []})
    name = scheme.format or infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(getattr(name, "value", name))
    weight: Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
    return weight
