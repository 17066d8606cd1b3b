"""The page of a report in a real browser: it fetches nothing, says nothing on the console, and fits its window.

`--pictures FOLDER` keeps the pictures that docs/report shows.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

import checkpoints
from shardmill import example
from shardmill.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(1200)]

PHONE: Final = (390, 844)
DESKTOP: Final = (1440, 1000)
LAYERS, EXPERTS, HIDDEN, WIDTH = 12, 32, 256, 128


def mixture() -> dict[str, Tensor]:
    """A small mixture of experts, some of which have heavier tails the later their layer."""
    tensors = {"model.embed_tokens.weight": checkpoints.gaussian(1, 512, HIDDEN)}
    seed = 2
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes = {f"{prefix}.self_attn.{leaf}_proj.weight": (HIDDEN, HIDDEN) for leaf in "qkvo"}
        shapes[f"{prefix}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for leaf, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
                shapes[f"{prefix}.mlp.experts.{expert}.{leaf}_proj.weight"] = shape
        for name, shape in shapes.items():
            seed += 1
            tensors[name] = checkpoints.gaussian(seed, *shape)
            if ".experts." in name and seed % 11 == 0:
                tensors[name].view(-1)[:: 1997 - 120 * layer] *= 4 + layer
        tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return tensors


class Browser:
    """Chromium with one page that lies on disk."""

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))

    def open(self, page: Path, size: tuple[int, int], *, is_dark: bool = False) -> None:
        self.resize(*size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.as_uri())

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    @property
    def requests(self) -> list[str]:
        """What was asked for since the last time, by URL."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]  # type: ignore[no-untyped-call]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def complaints(self) -> list[str]:
        """What the console says."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def picture(self, target: Path, width: int, height: int) -> None:
        """Keep a picture of the page, from its top to `height`."""
        self.resize(width, min(height, int(self.ask("document.documentElement.scrollHeight"))))
        time.sleep(0.5)
        self.driver.save_screenshot(str(target))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of two conversions: the model of the demo, and a mixture of experts."""
    home = tmp_path_factory.mktemp("pages")
    dense = example.prepare(home / "SmolLM2-135M-Instruct", cache=home / "cache")
    config = checkpoints.LLAMA | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": EXPERTS,
        "tie_word_embeddings": False, "_name_or_path": "example/tiny-moe",
    }  # fmt: skip
    sparse = checkpoints.write(home / "tiny-moe", checkpoints.deal(mixture(), 5), config=config)
    asked = {"dense": (dense, "W4A16", ["--group-size", "64"]), "experts": (sparse, "W4A16", [])}
    for name, (source, scheme, more) in asked.items():
        destination = str(home / f"{source.name}-{scheme}")
        page = str(home / f"{name}.html")
        assert main(["run", str(source), destination, "--scheme", scheme, *more, "-q", "--html", page]) == 0
    return {name: home / f"{name}.html" for name in asked}


@pytest.fixture
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = Path(request.config.getoption("--pictures") or tmp_path / "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("name", ["dense", "experts"])
@pytest.mark.parametrize("device", ["phone", "desktop"])
def test_a_page_fits_its_window_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], pictures: Path, name: str, device: str
) -> None:
    size = {"phone": PHONE, "desktop": DESKTOP}[device]
    _ = browser.requests, browser.complaints  # of the page before

    browser.open(pages[name], size, is_dark=(name, device) == ("experts", "desktop"))

    assert browser.requests == [pages[name].as_uri()]
    assert browser.complaints == []
    assert browser.ask("document.documentElement.scrollWidth") == size[0]
    assert browser.ask("document.scripts.length") == 0
    outside = """[...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.scroll, svg')
        && e.getBoundingClientRect().right > innerWidth + 1).length"""
    assert browser.ask(outside) == 0
    smallest = """Math.min(...[...document.querySelectorAll('svg text')].filter(t => t.textContent)
        .map(t => t.getBoundingClientRect().height))"""
    assert browser.ask(smallest) > 9
    browser.picture(pictures / f"{name}-{device}.png", size[0], 3600 if device == "desktop" else 3200)


def test_words_stand_out_from_their_background_in_both_schemes(browser: Browser, pages: dict[str, Path]) -> None:
    """WCAG's contrast of at least 4.5, for all text outside of pictures."""
    script = """(() => {
        const rgb = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 && m[3] === 0 ? null : m; };
        const lum = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
            return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
            return .2126 * r + .7152 * g + .0722 * b; };
        const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
            if (c) return c; } return [255, 255, 255]; };
        let worst = 99;
        for (const e of document.querySelectorAll('main *, header *, footer *')) {
            if (e.closest('svg') || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
            const [a, b] = [lum(rgb(getComputedStyle(e).color)), lum(behind(e))].sort((x, y) => y - x);
            worst = Math.min(worst, (a + .05) / (b + .05));
        }
        return worst; })()"""
    for is_dark in (False, True):
        browser.open(pages["dense"], DESKTOP, is_dark=is_dark)
        assert browser.ask(script) >= 4.5
