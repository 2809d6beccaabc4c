"""report.html in a real browser: every plot drawn, nothing asked of any host, no console error, wide and narrow."""

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from qlora_dist.track.report import write_report
from tests.single import small_config, train_here

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("QLORA_DIST_NO_CLUSTER_SKIPS"),
    reason="no Chromium here; install Debian's chromium to have report.html opened",
)
CHARTS = 8


@pytest.fixture(scope="module")
def page(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with evaluation, samples and a text that would be a script if it were not escaped."""
    run_dir = tmp_path_factory.mktemp("report") / "run"
    config = small_config(
        run_dir, tiny_model, data={"eval": "bundled:home_commands", "max_eval_rows": 4},
        train={"max_steps": 32, "global_batch_size": 2}, eval={"eval_steps": 8, "sample_prompts": 1},
    )  # fmt: skip
    train_here(config)
    events = run_dir / "events.jsonl"
    hostile = {"kind": "notice", "generation": 1, "message": "<script>console.error('x')</script><img src=//h.org/i>"}
    first = json.loads(events.read_text().splitlines()[0])
    with events.open("a") as file:
        file.write(json.dumps({**hostile, "time": first["time"] + 1000}) + "\n")
    return write_report(run_dir)


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium with its console and its pages' requests recorded."""
    assert CHROMIUM is not None, "no Chromium; install Debian's chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def requests_of(browser: Any) -> list[str]:
    """The addresses that the pages of this browser asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def test_the_report_opens_offline_with_every_plot(page: Path, browser: Any) -> None:
    browser.get(page.as_uri())
    assert [url for url in requests_of(browser) if not url.startswith("data:")] == [page.as_uri()]
    assert browser.get_log("browser") == []
    plots = re.findall(r"<figure>.*?</figure>", browser.page_source, flags=re.DOTALL)
    assert len(plots) == CHARTS
    for plot in plots:
        assert re.search(r'<path d="M [^"]+"[^>]*stroke: var\(--series-\d\)', plot), plot[:200]
    assert "<script" not in browser.page_source
    text = page.read_text()
    for word in ("Answers before and after", "Workers", "What happened", "learning_rate:", "&lt;script&gt;console"):
        assert word in text


def test_the_control_a_page_that_asks_for_something_is_seen(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'>")
    browser.get(page.as_uri())
    assert "http://127.0.0.1:9/x.png" in requests_of(browser)
    assert browser.get_log("browser") != []


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (420, "dark")])
def test_plots_are_visible_and_nothing_is_cut_off(page: Path, browser: Any, width: int, scheme: str) -> None:
    """Each plot has a wide line and legible text inside the window, in either colour scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60
    plots = browser.execute_script(
        "return [...document.querySelectorAll('figure')].map(figure => {"
        "  const lines = [...figure.querySelectorAll('path')].filter(path => /--series/.test(path.outerHTML));"
        "  const boxes = lines.map(line => line.getBoundingClientRect());"
        "  return {width: Math.max(...boxes.map(box => box.width)), right: Math.max(...boxes.map(box => box.right)),"
        "          text: figure.querySelector('svg text').getBoundingClientRect().height,"
        "          colour: getComputedStyle(lines[0]).stroke}; })"
    )
    assert len(plots) == CHARTS
    for plot in plots:
        assert plot["width"] > 200
        assert plot["right"] <= width
        assert plot["text"] >= 9  # CSS pixels
        assert plot["colour"].startswith("rgb(")
    if folder := os.environ.get("QLORA_DIST_SCREENSHOTS"):
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        (Path(folder) / f"report-{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
