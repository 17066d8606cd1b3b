"""Pages, cards and tables: foreign text stays text, large results stay small, numbers are those of the manifest."""

from __future__ import annotations

import io
import json
import re
import time
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
import yaml

from shardmill.core.digest import Digest
from shardmill.core.manifest import Manifest, ManifestShard, TensorDecision, Totals
from shardmill.core.receipt import WeightRecord
from shardmill.core.recipe import uniform
from shardmill.core.report import Histograms, Origin, Report, Stack, build_report
from shardmill.core.statistics import Statistics
from shardmill.errors import Problem
from shardmill.pages.card import MARK, render_card
from shardmill.pages.page import render_page
from shardmill.pages.pictures import (
    HOVER_CELLS,
    SHADES,
    Grid,
    expert_grid,
    heat_map,
    layer_picture,
    module_grid,
    spark_pictures,
    spread_picture,
)
from shardmill.pages.tables import to_json, to_parquet

NASTY = "a</title></svg></style><script>alert(1)</script>\"' onload=x `|{{7*7}}$x$ \x1b[31m\u202e" + "n" * 300
NOWHERE = Origin()
TOTALS = Totals(
    source_bytes=8000, output_bytes=4000, quantized_weights=2, quantized_bytes=2, copied_weights=1, copied_bytes=2
)


def found(error: float = 0.1) -> Statistics:
    return Statistics(count=8, squared_error=error**2, squared_weight=1.0, nonzero=8, zeroed=1, amax=1.0, max_error=0.1)


def a_shard(name: str, modules: list[str], error: float = 0.1) -> ManifestShard:
    return ManifestShard(
        name=name,
        key="k",
        size=4,
        digest=Digest("blake3", "0" * 64),
        tensors=tuple(
            TensorDecision(name=f"{m}.weight", action="quantize", reason="r", scheme="W4A16") for m in modules
        ),
        weights=tuple(WeightRecord(m, "W4A16", found(error)) for m in modules),
    )


def a_report(*shards: ManifestShard, origin: Origin = NOWHERE, **more: object) -> Report:
    manifest = Manifest(
        plan="p" * 64,
        recipe=uniform("W4A16"),
        files=(),
        warnings=(),
        totals=TOTALS,
        shards=shards,
        **more,  # type: ignore[arg-type]  # fields of a manifest
    )
    return build_report(manifest, origin)


def hostile() -> Report:
    """A report in which every foreign text is as bad as it can be."""
    weight = WeightRecord(f"{NASTY}.layers.3.{NASTY}", NASTY, found())
    shard = ManifestShard(
        name=NASTY,
        key=NASTY,
        size=4,
        digest=Digest("blake3", NASTY),
        tensors=(TensorDecision(name=NASTY, action=NASTY, reason=NASTY),),
        weights=(weight,),
    )
    origin = Origin(destination=f"/x/{NASTY}", source=NASTY, base_model=NASTY, architecture=NASTY, notes=(NASTY,))
    return build_report(
        Manifest(
            plan=NASTY,
            recipe=uniform("W4A16", ["re:.*</pre><script>"]),
            files=((NASTY, Digest("blake3", "00")),),
            warnings=(Problem(file=NASTY, tensor=NASTY, kind="k", message=NASTY),),
            totals=TOTALS,
            shards=(shard,),
            sources=((NASTY, Digest("sha256", NASTY)),),
            versions=((NASTY, NASTY),),
        ),
        origin,
        histograms={weight.module: Histograms(weight=(1, 2, 3), error=(0, 1, 0), weight_reach=1.0, error_reach=0.1)},
    )


class Tags(HTMLParser):
    """Every element of a page with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_foreign_text_is_text_on_the_page() -> None:
    page = render_page(hostile())
    read = Tags(page)

    names = {tag for tag, _ in read.tags}
    assert names.isdisjoint({"script", "iframe", "img", "object", "form", "base"})
    assert {name for _, attributes in read.tags for name in attributes if name.startswith("on")} == set()
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "{{7*7}}" in read.words
    assert "<script>alert(1)</script>" in read.words  # shown as it is


def test_the_page_fetches_nothing() -> None:
    read = Tags(render_page(hostile()))

    targets = [a[name] for _, a in read.tags for name in ("src", "href", "data", "action", "srcset") if name in a]
    assert all(target is not None and re.match(r"#|data:", target) for target in targets)
    policies = [a["content"] for tag, a in read.tags if tag == "meta" and "http-equiv" in a]
    assert [str(policy).split(";")[0] for policy in policies] == ["default-src 'none'"]
    styles = re.findall(r"<style>(.*?)</style>", render_page(hostile()), re.DOTALL)
    assert not re.search(r"url\(|@import|http", "".join(styles))


def test_every_picture_has_an_alternative_and_headings_are_in_order() -> None:
    modules = [f"model.layers.{layer}.mlp.experts.{e}.up_proj" for layer in range(3) for e in range(4)]
    read = Tags(render_page(a_report(a_shard("s", modules))))

    pictures = [attributes for tag, attributes in read.tags if tag == "svg"]
    assert len(pictures) == 4
    assert all(a["role"] == "img" and a["aria-label"] for a in pictures)
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    anchors = {a["href"] for tag, a in read.tags if tag == "a"}
    assert anchors <= {f"#{a['id']}" for _, a in read.tags if "id" in a}


@pytest.mark.slow
def test_a_result_of_fifty_thousand_weights_gives_a_small_page_soon() -> None:
    """256 experts of 3 projections in 61 layers, a thousand shards with sources."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}_proj"
        for layer in range(61) for expert in range(256) for leaf in ("gate", "up", "down")
    ] + [f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(61) for leaf in "qkvo"]  # fmt: skip
    assert len(names) > 47_000
    step = -(-len(names) // 1000)
    shards = [
        a_shard(f"model-{n:05d}.safetensors", names[first : first + step], 0.05 + n / 1e5)
        for n, first in enumerate(range(0, len(names), step))
    ]
    sources = tuple((shard.name, Digest("blake3", f"{n:064d}")) for n, shard in enumerate(shards))
    begun = time.monotonic()

    page = render_page(a_report(*shards, sources=sources))

    print(f"{len(page):,} bytes in {time.monotonic() - begun:.1f} s")
    assert len(page) < 5_000_000
    assert page.count(f"{0:064d}") >= 1


@pytest.mark.parametrize("error", [0.0, 1.0, float("nan"), float("inf")])
def test_pictures_draw_whatever_was_measured(error: float) -> None:
    stack = build_report(a_report(a_shard("s", ["a.0.b", "a.1.experts.2.c"], error)).manifest).stacks[0]

    for picture in (layer_picture(stack), heat_map(module_grid(stack)), heat_map(expert_grid(stack))):
        assert ET.fromstring(picture.inline()).tag == "svg"  # noqa: S314  our own
        assert re.fullmatch(r"!\[[^\[\]]+\]\(data:image/svg\+xml;base64,[A-Za-z0-9+/=]+\)", picture.as_image())


def grid(rows: int, columns: int) -> Grid:
    values = {(row, column): 20.0 + row - column / 2 for row in range(rows) for column in range(columns)}
    return Grid(
        rows=tuple(map(str, range(rows))), columns=tuple(f"m.c{n}" for n in range(columns)), values=values, what="x"
    )


@pytest.mark.parametrize("size", [(3, 2), (80, 4), (30, 40), (61, 256)])
def test_runs_and_cells_of_a_heat_map_cover_the_same_places(size: tuple[int, int]) -> None:
    rows, columns = size
    drawn = ET.fromstring(heat_map(grid(rows, columns), has_titles=False).inline())  # noqa: S314
    runs = re.findall(r"M(\d+) (\d+)h(\d+)v1", "".join(p.attrib["d"] for p in drawn.iter("path")))
    covered = [(int(y), x) for begin, y, width in runs for x in range(int(begin), int(begin) + int(width))]
    assert sorted(covered) == sorted(grid(rows, columns).values)
    if rows * columns <= HOVER_CELLS:
        cells = ET.fromstring(heat_map(grid(rows, columns)).inline())  # noqa: S314
        assert len([g for g in cells.iter("g") if g.find("title") is not None]) == rows * columns


def test_worst_and_best_cells_have_the_ends_of_the_scale() -> None:
    drawn = heat_map(grid(9, 1)).inline()
    assert [drawn.index(f'class="k{n}"') for n in (0, len(SHADES) - 1)] == sorted(
        drawn.index(f'class="k{n}"') for n in (0, len(SHADES) - 1)
    )
    assert "from 20.0 to 28.0 dB" in drawn


def test_histograms_tell_their_extent() -> None:
    weight, error = spark_pictures(Histograms(weight=(0, 3, 1), error=(1, 0, 0), weight_reach=2.0, error_reach=0.5))
    assert "histogram of 4 weights from -2 to 2" in weight.alternative
    assert "75.0%" in weight.alternative
    assert "1 errors from -0.5 to 0.5" in error.alternative
    spread = spread_picture([20.0, 20.05, 25.0, float("inf")], "x")
    assert spread is not None
    assert "3 values from 20.0 to 25.0 dB" in spread.alternative
    assert spread_picture([float("nan")], "x") is None


def test_many_layers_make_a_wider_chart_and_not_thinner_bars() -> None:
    report = build_report(a_report(a_shard("s", [f"m.{n}.q_proj" for n in range(400)])).manifest)
    stack: Stack = report.stacks[0]
    picture = layer_picture(stack)
    assert picture.width > 2000
    assert picture.inline().count("<circle") == 300


def test_the_card_is_read_by_the_hub_and_keeps_foreign_text_in_code() -> None:
    card = render_card(hostile())

    assert card.startswith(MARK)
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    facts = yaml.safe_load(front)
    assert "base_model" not in facts
    outside = re.sub(r"(?s)```+\w+\n.*?\n```+|`[^`\n]*`", "", body)
    assert "<script" not in outside
    assert "\x1b" not in card


def test_the_card_says_what_was_done_to_what() -> None:
    origin = Origin(destination="s3://b/tiny-W4A16", base_model="org/tiny")
    card = render_card(a_report(a_shard("s", ["model.layers.0.mlp.up_proj"]), origin=origin))

    facts = yaml.safe_load(card.removeprefix("---\n").partition("\n---\n")[0])
    assert facts["base_model"] == "org/tiny"
    assert facts["base_model_relation"] == "quantized"
    assert {"compressed-tensors", "w4a16", "vllm"} <= set(facts["tags"])
    assert facts["library_name"] == "transformers"
    for text in (
        "# tiny-W4A16\n",
        "[org/tiny](https://huggingface.co/org/tiny)",
        "vllm serve ORGANIZATION/tiny-W4A16",
        "shardmill run hf://org/tiny tiny-W4A16 --scheme W4A16",
        "| feed-forward | 1 | 1 |",
        "does not measure",
    ):
        assert text in card


def test_tables_hold_the_same_rows() -> None:
    report = a_report(a_shard("s", ["model.layers.0.mlp.experts.3.up_proj", "lm_head"], 0.0))
    document = json.loads(to_json(report))
    assert [row["name"] for row in document["tensors"]] == ["model.layers.0.mlp.experts.3.up_proj", "lm_head"]
    assert document["tensors"][0]["sqnr_db"] is None

    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra `parquet`")
    table = parquet.read_table(io.BytesIO(to_parquet(report)))
    assert table.to_pylist() == document["tensors"]
