"""What tests ask for that go through all presets: NVFP4 must be told the scale of its activations, and no other."""

from __future__ import annotations

from typing import Any, Final

from shardmill.core.recipe import Recipe, parse_recipe
from shardmill.core.scheme import PRESETS

INPUT_SCALE: Final = "constant:6"


def asked(scheme: str) -> dict[str, Any]:
    """A recipe as a file holds it."""
    return {"scheme": scheme, **({"input_scale": INPUT_SCALE} if PRESETS[scheme].needs_input_scale else {})}


def recipe_of(scheme: str, **more: Any) -> Recipe:
    """The same as a value."""
    return parse_recipe(asked(scheme) | more)
