"""The form: what a server refuses when a run is created, what the flow refuses, and what the library is told."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from prefect.utilities.schema_tools import is_valid_schema, validate
from pydantic import ValidationError

from served import Ask
from shardmill.core.limits import NAMES, Intake, Limits
from shardmill.core.recipe import parse_recipe, uniform
from shardmill.core.scheme import PRESETS
from shardmill.errors import RecipeInvalid
from shardmill.flows.parameters import BatchRequest, LimitName, QuantizeRequest
from shardmill.flows.quantize_checkpoint import quantize_checkpoint

SCHEMA = quantize_checkpoint.parameters.model_dump_for_openapi()
MINIMAL = {"source": "/models/m", "destination": "/models/out"}

REFUSED: list[tuple[str, Any]] = [
    ("scheme", "FP9"),
    ("scheme", "fp8_dynamic"),
    ("scheme", None),
    ("group_size", 0),
    ("group_size", 65537),
    ("group_size", "many"),
    ("ignore", [""]),
    ("ignore", ["x" * 1001]),
    ("ignore", "lm_head"),
    ("indivisible", "skip"),
    ("expert_layout", "diagonal"),
    ("workers", -1),
    ("workers", 257),
    ("verify", "none"),
    ("device", "cuda:x"),
    ("device", "gpu; true"),
    ("device", "cpu\n"),
    ("source", "relative/path"),
    ("source", ""),
    ("source", "/models/\n"),
    ("source", "s3://name:word@bucket/m"),
    ("source", "simplecache::https://name@host/m"),
    ("destination", "https://token@host/m"),
    ("store", "s3://name:word@bucket/m"),
    ("recipe", ["W4A16"]),
    ("input_scale", "6"),
    ("input_scale", "constant:six"),
    ("input_scale", "constant:-1"),
    ("input_scale", "constant:6\n"),
    ("input_scale", "donor:relative/path"),
    ("input_scale", "donor:/models/\n"),
    ("input_scale", "donor:s3://name:word@bucket/m"),
    ("budget", "4.5"),
    ("budget", "4.5bpw\n"),
    ("schema", "W4A16"),
    ("Source", "/models/m"),
]

ACCEPTED: list[dict[str, Any]] = [
    {},
    {"source": "s3://bucket/a/m@v1", "destination": "s3://bucket/out", "store": "s3://bucket/store"},
    {"source": "hf://org/name@main"},
    {"source": "~/m", "destination": "file:///models/out"},
    {"scheme": "W4A16", "group_size": 64, "ignore": ["lm_head", "re:.*router"], "workers": 3, "verify": "full"},
    {"device": "cuda:0,cuda:1"},
    {"device": "cuda"},
    {"budget": "4.5bpw-quantized", "candidates": ["W4A16:64", "W8A16"]},
    {"expert_layout": "rows", "indivisible": "copy", "partial_fused": True, "default_ignores": False},
    {"recipe": {"groups": [{"scheme": "FP8_DYNAMIC"}]}},
    {"scheme": "NVFP4", "input_scale": "constant:1e3"},
    {"scheme": "NVFP4", "input_scale": "donor:s3://bucket/calibrated"},
    {"recipe": {"scheme": "NVFP4", "input_scale": "constant:6"}},
]


def server_accepts(request: dict[str, Any]) -> bool:
    """Whether the schema that a server keeps with a deployment lets the parameters through."""
    return bool(validate({"request": request}, SCHEMA, raise_on_error=False) == [])


def test_the_schema_is_one() -> None:
    is_valid_schema(SCHEMA)  # raises
    assert SCHEMA["required"] == ["request"]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_a_server_refuses_a_bad_value_when_the_run_is_created(field: str, value: Any) -> None:
    assert not server_accepts(MINIMAL | {field: value})


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_the_flow_refuses_a_bad_value_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        QuantizeRequest.model_validate(MINIMAL | {field: value})
    assert {str(error["loc"][0]) for error in caught.value.errors()} == {field}


@pytest.mark.parametrize("request_", ACCEPTED)
def test_a_good_request_passes_both(request_: dict[str, Any]) -> None:
    assert server_accepts(MINIMAL | request_)
    assert QuantizeRequest.model_validate(MINIMAL | request_)


@pytest.mark.parametrize("choices", [{"scheme": "NVFP4"}, {"scheme": "W4A16", "input_scale": "constant:6"}])
def test_a_policy_of_input_scales_goes_with_the_one_scheme_that_needs_it(choices: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="input_scale goes with the scheme NVFP4"):
        QuantizeRequest.model_validate(MINIMAL | choices)


def test_a_recipe_replaces_the_policy_and_another_scheme_of_a_checkpoint_drops_it() -> None:
    with pytest.raises(ValidationError, match="a recipe replaces input_scale"):
        QuantizeRequest.model_validate(MINIMAL | {"recipe": {"scheme": "W4A16"}, "input_scale": "constant:6"})
    asked = {"sources": ["/m"], "destination": "/out/{name}", "scheme": "NVFP4", "input_scale": "constant:6"}
    batch = BatchRequest.model_validate(asked)
    assert batch.request_for("/m", "/out/m", {}).to_recipe() == uniform("NVFP4", input_scale="constant:6")
    assert batch.request_for("/m", "/out/m", {"scheme": "W4A16"}).to_recipe() == uniform("W4A16")


@pytest.mark.parametrize("field", ["source", "destination"])
def test_where_from_and_where_to_must_be_said(field: str) -> None:
    request = {name: value for name, value in MINIMAL.items() if name != field}
    assert not server_accepts(request)
    with pytest.raises(ValidationError):
        QuantizeRequest.model_validate(request)


def form() -> dict[str, Any]:
    return dict(SCHEMA["definitions"]["QuantizeRequest"]["properties"])


def test_the_form_offers_every_preset_and_no_other() -> None:
    assert form()["scheme"]["enum"] == list(PRESETS)


def test_every_field_of_the_form_is_described() -> None:
    assert {name for name, field in form().items() if not field.get("description")} == set()
    assert SCHEMA["definitions"]["QuantizeRequest"]["description"]


def test_the_flow_itself_refuses_an_unknown_field_by_name(ask: Ask) -> None:
    state = quantize_checkpoint({"speed": "fast", **ask().model_dump()}, return_state=True)

    assert state.is_failed()
    assert "request.speed" in str(state.result(raise_on_failure=False))


def test_the_choices_become_the_recipe() -> None:
    choices = {
        "scheme": "W4A16",
        "group_size": 64,
        "ignore": ["lm_head"],
        "default_ignores": False,
        "indivisible": "copy",
    }
    more = {"expert_layout": "rows", "partial_fused": True}

    recipe = QuantizeRequest.model_validate(MINIMAL | choices | more).to_recipe()

    assert recipe == parse_recipe(choices | more)
    assert recipe.groups[0].scheme.weights.group_size == 64


def test_a_group_size_that_the_scheme_has_no_use_for_is_refused() -> None:
    request = QuantizeRequest.model_validate(MINIMAL | {"scheme": "NVFP4A16", "group_size": 64})
    with pytest.raises(RecipeInvalid, match="group_size 64 does not fit"):
        request.to_recipe()


def test_a_recipe_replaces_the_choices() -> None:
    recipe = {"groups": [{"targets": ["re:.*mlp.*"], "scheme": "W8A16"}, {"scheme": "FP8_DYNAMIC"}]}
    request = QuantizeRequest.model_validate(MINIMAL | {"recipe": recipe})
    assert request.to_recipe() == parse_recipe(recipe)
    assert request.label == "m-recipe"


def test_a_recipe_beside_other_choices_is_refused() -> None:
    with pytest.raises(ValidationError, match="a recipe replaces ignore"):
        QuantizeRequest.model_validate(MINIMAL | {"recipe": {"scheme": "W4A16"}, "ignore": ["lm_head"]})


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("/models/Qwen3-8B/", "Qwen3-8B-W4A16"),
        ("hf://org/name@main", "name-W4A16"),
        ("/models/{request.source}\x7f", "{request.source}\\x7f-W4A16"),
        ("/" + "x" * 200, "x" * 59 + "…-W4A16"),
    ],
)
def test_a_run_is_named_after_checkpoint_and_scheme(source: str, label: str) -> None:
    assert QuantizeRequest.model_validate(MINIMAL | {"source": source, "scheme": "W4A16"}).label == label


def test_the_job_holds_locations_and_options() -> None:
    request = QuantizeRequest.model_validate(MINIMAL | {"device": "cpu", "workers": 3, "verify": "full"})
    job = request.to_job("run")
    assert (job.run, job.locations.source, job.locations.destination, job.locations.store) == (
        "run",
        "/models/m",
        "/models/out",
        "",
    )
    assert (job.options.device, job.options.workers, job.options.verify) == ("cpu", 3, "full")


def test_the_form_takes_every_limit_and_tells_what_is_let_in() -> None:
    assert get_args(LimitName) == NAMES
    request = QuantizeRequest(source="/a", destination="/b", limits={"rank": 12}, allow_code=True)
    assert request.locations.intake == Intake(limits=Limits(rank=12), allow_code=True)
    with pytest.raises(RecipeInvalid, match="from 1 to 64"):
        _ = QuantizeRequest(source="/a", destination="/b", limits={"rank": 65}).locations


@pytest.mark.parametrize(
    "choices",
    [
        {"candidates": ["W4A16", "W8A16"]},
        {"budget": "5bpw", "scheme": "W4A16"},
        {"budget": "5bpw", "dequantize": True},
        {"budget": "5bpw", "recipe": {"scheme": "W4A16"}},
    ],
)
def test_a_budget_goes_with_no_scheme_and_no_recipe(choices: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="budget"):
        QuantizeRequest.model_validate(MINIMAL | choices)


def test_a_budget_is_wished_for_with_the_search_and_all_other_choices() -> None:
    choices = {"budget": "12GB", "candidates": ["W4A16", "FP8_DYNAMIC"], "group_size": 64, "search": "mse"}
    request = QuantizeRequest.model_validate(MINIMAL | choices | {"ignore": ["a"]})
    wish = request.wish
    assert wish is not None
    assert [scheme.label for scheme in wish.candidates] == ["int4 group 64 mse", "FP8_DYNAMIC mse"]
    assert (wish.budget.amount, wish.base.ignore, request.label) == (12e9, ("a",), "m-12GB")
    assert QuantizeRequest.model_validate(MINIMAL).wish is None
