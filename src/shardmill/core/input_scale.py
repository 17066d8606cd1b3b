"""Where the global scale of NVFP4 activations comes from: an assumed largest value, or another checkpoint.

compressed-tensors stores one per module, `input_global_scale`, F32 `[1]`, = 448 * 6 / amax (`generate_gparam`). At run
time 16 activations share a local scale, E4M3 of input_global_scale * amax_16 / 6; 448 is the largest that fits, so all
is well while no activation exceeds amax. Above it they are clipped; E4M3 keeps its three bits for groups whose largest
value is above amax / 28672, so room to spare costs nothing. ModelOpt stores `input_scale` = amax / (448 * 6), the
reciprocal.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from shardmill.core.digest import Digest, digest_json
from shardmill.core.dtypes import E2M1_MAX, E4M3_MAX
from shardmill.core.fused import TABLE, FusedTable, fused_sets
from shardmill.errors import Problem, RecipeInvalid, show

PARAM: Final = "input_global_scale"
"""As compressed-tensors and vLLM name it, below the module."""
CONSTANT: Final = "constant"
DONOR: Final = "donor"
SPELLINGS: Final = "constant:V (an assumed largest activation) or donor:LOCATION (a calibrated checkpoint)"
_REACH: Final = E4M3_MAX * E2M1_MAX
_LEAST: Final = 2.0**-126
"""The smallest normal number of float32."""
_FIELDS: Final = frozenset({"kind", "amax", "digest", "location"})


def _invalid(message: str, way_out: str = f"give {SPELLINGS}") -> RecipeInvalid:
    return RecipeInvalid([Problem(kind="input-scale", message=message, way_out=way_out)])


def to_float32(value: float) -> float:
    """Round to float32; what is too large becomes infinite.

    >>> to_float32(0.1), to_float32(1e39)
    (0.10000000149011612, inf)
    """
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.inf


def reciprocal(value: float) -> float:
    """1 / value in float32: between the conventions of compressed-tensors and ModelOpt; infinite for zero."""
    return to_float32(1 / value) if value else math.inf


def is_sound(scale: float) -> bool:
    """Whether a global scale is a positive, finite, normal float32 whose reciprocal is one, too."""
    return all(_LEAST <= number < math.inf for number in (scale, reciprocal(scale)))


def global_scale_of(amax: float) -> float:
    """The global scale of values up to `amax`: 2688 times its reciprocal, each rounded, as compressed-tensors has it.

    >>> global_scale_of(6.0), global_scale_of(1.75)
    (448.0, 1536.0001220703125)
    """
    return to_float32(_REACH * reciprocal(to_float32(amax)))


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScale:
    """A policy; see the module.

    >>> parse_input_scale("constant:6").to_json()
    {'kind': 'constant', 'amax': 6.0}
    """

    kind: str
    amax: float = 0.0
    """Of `constant`: the largest activation that is assumed, in every module."""
    digest: str = ""
    """Of `donor`: of the scales that are taken, see `scales_digest`; empty while they are not read."""
    location: str = field(default="", compare=False)
    """Where the donor lies: for those who read it, and in no key and no document."""

    def __post_init__(self) -> None:
        if self.kind == CONSTANT and not (0 < self.amax < math.inf and is_sound(global_scale_of(self.amax))):
            raise _invalid(f"expected a positive number that float32 holds behind `constant:`, found {self.amax!r}")

    @property
    def constant(self) -> float | None:
        """The one global scale of every module; None where each has its own."""
        return global_scale_of(self.amax) if self.kind == CONSTANT else None

    def to_json(self) -> dict[str, Any]:
        """Describe it without its location; the inverse of `parse_input_scale`."""
        if self.kind == CONSTANT:
            return {"kind": CONSTANT, "amax": self.amax}
        return {"kind": DONOR, **({"digest": self.digest} if self.digest else {})}

    def to_key(self) -> dict[str, Any]:
        """What it adds to the scheme in a job key; scales of a donor stand there one by one."""
        return self.to_json() if self.kind == CONSTANT else {"kind": DONOR}

    def told(self) -> str:
        """In words for people."""
        if self.kind == CONSTANT:
            scale = f"{PARAM} {self.constant:g} everywhere"
            return f"assumed, not measured, to stay within {self.amax:g} ({scale}); a proxy, larger ones are clipped"
        digest = f" (digest {self.digest[:23]}…)" if self.digest else ""
        return f"scaled by the {PARAM} of a calibrated donor{digest}"


def parse_input_scale(value: Any) -> InputScale:
    """Read `constant:V`, `donor:LOCATION`, or a mapping as documents have it.

    Raises:
        RecipeInvalid: anything else.

    >>> parse_input_scale("donor:s3://models/a-NVFP4").location
    's3://models/a-NVFP4'
    """
    if isinstance(value, str):
        kind, colon, rest = value.partition(":")
        if kind == CONSTANT and colon:
            return InputScale(kind=CONSTANT, amax=_number(rest))
        if kind == DONOR and rest:
            return InputScale(kind=DONOR, location=rest)
    elif isinstance(value, Mapping) and not set(map(str, value)) - _FIELDS:
        amax, texts = value.get("amax"), [value.get(name, "") for name in ("digest", "location")]
        if value.get("kind") == CONSTANT and isinstance(amax, int | float) and not isinstance(amax, bool):
            return InputScale(kind=CONSTANT, amax=float(amax))
        if value.get("kind") == DONOR and all(isinstance(text, str) for text in texts):
            return InputScale(kind=DONOR, digest=texts[0], location=texts[1])
    raise _invalid(f"input_scale cannot be read: {show(str(value))}")


def _number(text: str) -> float:
    try:
        return float(text) if text.isascii() and text == text.strip() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def shared_scales(scales: Mapping[str, float], table: FusedTable = TABLE) -> dict[str, float]:
    """Give the members of each fused set one global scale: the smallest, which is that of the largest amax.

    vLLM keeps the largest of a merged layer (`CompressedTensorsW4A4Fp4`), so that inputs which another member was
    calibrated for would be clipped; for gate and up of an expert it keeps the smallest itself.

    >>> shared_scales({"a.gate_proj": 8.0, "a.up_proj": 4.0, "a.down_proj": 9.0})
    {'a.gate_proj': 4.0, 'a.up_proj': 4.0, 'a.down_proj': 9.0}
    """
    found = dict(scales)
    for members in fused_sets(scales, table):
        found |= dict.fromkeys(members, min(scales[member] for member in members))
    return found


def scales_digest(scales: Mapping[str, float]) -> str:
    """Name the global scales of all modules by content: equal digests, equal scales.

    >>> scales_digest({"a": 1.0, "b": 2.0}) == scales_digest({"b": 2.0, "a": 1.0})
    True
    """
    return str(Digest("sha256", digest_json(sorted(scales.items()))))


def told_policies(policies: Iterable[InputScale | None]) -> tuple[str, ...]:
    """One line for each policy, without repetitions."""
    return tuple(dict.fromkeys(f"activations are {policy.told()}" for policy in policies if policy is not None))
