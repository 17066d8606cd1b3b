"""What people see and click in Prefect's UI, in a real browser, against a real server and worker."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import Artifact, FlowRun, TaskRun

import checkpoints
from shardmill.core.scheme import PRESETS
from workers import DEPLOYMENT, end_of, serving, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(1800)]

WIDTH = 1280
PATIENCE = 180.0
"""Seconds until a page of a busy server must show what it has."""
MODEL = "TinyLlama"
SCHEME = "W4A16"
SHARDS = 6
BROKEN = f"model-00003-of-{SHARDS:05d}.safetensors"


class Page:
    """A browser with one page of the UI in it."""

    def __init__(self, base: str, pictures: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(argument)
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self._base = base
        self._pictures = pictures
        self.resize(1000)

    def resize(self, height: int) -> None:
        """Make what is seen of a page as wide as the pictures and as high as is asked."""
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open(self, path: str, *texts: str) -> None:
        """Open a page, and wait until it shows these texts."""
        self.driver.get(self._base + path)
        self.see(*texts)

    @property
    def text(self) -> str:
        """All that is to be read."""
        return str(self.driver.execute_script("return document.body.innerText"))

    def see(self, *texts: str) -> None:
        for text in texts:
            wait_until(f"the page shows {text!r}", partial(self._has, text), PATIENCE)

    def _has(self, text: str) -> bool:
        return text in self.text

    def find(self, xpath: str) -> Any:
        """The first element that is shown."""
        from selenium.webdriver.common.by import By

        return wait_until(
            f"the page has {xpath}",
            lambda: next((e for e in self.driver.find_elements(By.XPATH, xpath) if e.is_displayed()), None),
            PATIENCE,
        )

    def click(self, xpath: str) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.find(xpath))
        self.find(xpath).click()

    def field(self, label: str) -> Any:
        """The input that belongs to a label of a form."""
        name = self.find(f"//label[starts-with(normalize-space(.), '{label}')]").get_attribute("for")
        return self.find(f"//*[@id='{name}']")

    def choices(self, label: str) -> list[str]:
        """What the select of a label offers; leaves it open."""
        from selenium.webdriver.common.by import By

        self.field(label).click()
        self.find("//*[@role='option']")
        return [option.text for option in self.driver.find_elements(By.XPATH, "//*[@role='option']")]

    def choose(self, label: str, value: str) -> None:
        self.choices(label)
        self.click(f"//*[@role='option'][normalize-space(.)='{value}']")
        wait_until(f"{value} is chosen", lambda: value in self.field(label).text, 60)

    def picture(self, name: str, height: int = 1000) -> None:
        """Keep a picture of the page."""
        self.resize(height)
        time.sleep(5)  # what moves comes to rest, such as the graph of a run
        self.driver.save_screenshot(str(self._pictures / f"{name}.png"))


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the deployment and a worker; the URL of its API."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    with serving(tmp_path_factory.mktemp("served")) as service, service.worker():
        yield service.url


@pytest.fixture
def page(api: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A browser; its pictures stay in the folder of `--pictures`."""
    pictures = Path(request.config.getoption("--pictures") or tmp_path / "pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    page = Page(api.removesuffix("/api") + "/v2", pictures)
    yield page
    page.driver.quit()


@pytest.fixture
def client(api: str) -> Iterator[SyncPrefectClient]:
    with SyncPrefectClient(api) as client:
        yield client


def blobs_below(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of the last change of every finished result in a store."""
    found = {path.name: path.stat() for path in (folder / ".shardmill" / "blobs").glob("*.safetensors")}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def shard_runs(client: SyncPrefectClient, run: FlowRun, attempt: int) -> dict[str, str]:
    """State name by shard, of the task runs of one attempt of a flow run, when all are final."""

    def all_final() -> list[TaskRun]:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        runs = client.read_task_runs(flow_run_filter=chosen)
        found = [r for r in runs if r.name.startswith("quantize ") and r.flow_run_run_count == attempt]
        return found if sum(bool(r.state and r.state.is_final()) for r in found) == SHARDS else []

    runs = wait_until(f"{SHARDS} task runs of attempt {attempt} are final", all_final, 60)
    return {r.name.split()[1]: r.state.name for r in runs}


def artifacts_of(client: SyncPrefectClient, run: FlowRun) -> list[Artifact]:
    """The artifacts of a run, oldest first."""
    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    found = [artifact for artifact in client.read_artifacts(artifact_filter=chosen) if artifact.key]
    return sorted(found, key=lambda artifact: artifact.created or datetime.min.replace(tzinfo=UTC))


def request_a_run(page: Page, client: SyncPrefectClient, source: Path, destination: Path) -> FlowRun:
    """Fill in the form of the deployment, send it off and return the run that comes of it."""
    deployment = client.read_deployment_by_name(DEPLOYMENT)
    page.resize(2400)
    page.open(f"/deployments/deployment/{deployment.id}/run", "Destination", "Scheme", "Verify")
    page.field("Source").send_keys(str(source))
    page.field("Destination").send_keys(str(destination))
    page.choose("Scheme", SCHEME)
    page.click("//button[normalize-space(.)='Submit']")
    run = wait_until("the run exists", lambda: next(iter(client.read_flow_runs()), None), 60)
    assert isinstance(run, FlowRun)
    return run


def test_the_form_has_every_field_with_its_help(page: Page, client: SyncPrefectClient) -> None:
    deployment = client.read_deployment_by_name(DEPLOYMENT)
    assert deployment.parameter_openapi_schema is not None
    fields = deployment.parameter_openapi_schema["definitions"]["QuantizeRequest"]["properties"]
    page.resize(2400)

    page.open(f"/deployments/deployment/{deployment.id}/run", "Destination", "Scheme", "Verify")

    for name, schema in fields.items():
        assert name.replace("_", " ").title() in page.text
        assert schema["description"] in page.text
    page.picture("form", 2000)
    assert page.choices("Scheme") == list(PRESETS)
    page.picture("form-schemes", 1000)


def test_retry_in_the_page_does_only_the_broken_shard_again(
    page: Page, client: SyncPrefectClient, tmp_path: Path
) -> None:
    source = checkpoints.write(tmp_path / MODEL, checkpoints.deal(checkpoints.llama(6, 256, 512), SHARDS))
    whole = checkpoints.poison(source / BROKEN)
    time.sleep(2.1)  # the worker does not remember digests of younger files

    run = request_a_run(page, client, source, tmp_path / "result")

    assert end_of(client, run.id) == "Failed"
    assert {shard for shard, state in shard_runs(client, run, 1).items() if state != "Completed"} == {BROKEN}
    before = blobs_below(tmp_path)
    assert len(before) == SHARDS - 1
    page.open(f"/runs/flow-run/{run.id}?tab=Artifacts", "Failed", "plan", "progress", "failures")
    page.picture("run-failed")
    look_at(page, client, run, "failures", BROKEN)

    (source / BROKEN).write_bytes(whole)
    time.sleep(2.1)
    page.open(f"/runs/flow-run/{run.id}?tab=Artifacts", "Failed")
    page.click("//button[@aria-haspopup='menu']")
    page.click("//*[@role='menuitem'][normalize-space(.)='Retry']")
    page.click("//*[@role='alertdialog' or @role='dialog']//button[normalize-space(.)='Retry']")

    assert end_of(client, run.id, attempt=2) == "Completed"
    states = shard_runs(client, run, 2)
    assert {shard for shard, state in states.items() if state != "Cached"} == {BROKEN}
    assert states[BROKEN] == "Completed"
    after = blobs_below(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert len(after) == SHARDS
    assert (tmp_path / "result" / "config.json").exists()
    keys = [artifact.key for artifact in artifacts_of(client, run)]
    assert (keys.count("plan"), keys.count("progress"), keys.count("failures"), keys.count("report")) == (2, 2, 1, 1)
    page.open(f"/runs/flow-run/{run.id}?tab=TaskRuns", "Completed", "Cached", BROKEN)
    page.picture("run-completed", 1300)
    for key, *texts in [("plan", BROKEN), ("progress", "100"), ("report", "bits per weight")]:
        look_at(page, client, run, key, *texts)


def look_at(page: Page, client: SyncPrefectClient, run: FlowRun, key: str, *texts: str) -> None:
    """Open the newest artifact of a key, and keep a picture of it."""
    found = [artifact for artifact in artifacts_of(client, run) if artifact.key == key]
    page.open(f"/artifacts/artifact/{found[-1].id}", *texts)
    page.picture(key, 1700 if key == "report" else 1000)
