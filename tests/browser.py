"""Every notebook in JupyterLab, and the pages, as a reader sees them: `./run_tests.sh --browser`, where Chromium is.

A headless Chromium of 1366 × 768 opens each notebook, runs all its cells in the smoke profile and looks for errors,
warnings, pictures without words and anything wider than the screen. It is spoken to in its own protocol (CDP).
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import websocket
from made_up import wait_for

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[01][0-9]_*.ipynb"))
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
WRONG = """(() => {
  const found = [], all = (selector) => [...document.querySelectorAll(selector)];
  for (const area of all('[data-mime-type="application/vnd.jupyter.stderr"], .jp-mod-error, .output_stderr'))
    // nothing, or a progress bar, or that the five iterations of the smoke profile are too few
    if (!/^((training|decoding|verifying):.*|.*did not converge in max_iter=5 .*)?$/s.test(area.innerText.trim()))
      found.push('stderr: ' + area.innerText.slice(0, 300));
  if (!window.jupyterapp)  // JupyterLab draws a picture without its words; the caption stands below
    for (const image of all('img'))
      if (!image.alt.trim()) found.push('no words: ' + image.outerHTML.slice(0, 80));
  for (const wide of all('SELECTOR'))
    if (wide.scrollWidth > wide.clientWidth + 2) found.push('wide: ' + wide.innerText.slice(0, 120));
  return found;
})()"""


class Page:
    """A page of a headless Chromium."""

    def __init__(self, folder: Path):
        options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
        options += " --disable-component-update --disable-sync --remote-debugging-port=0"
        options += " --remote-allow-origins=* --window-size=1366,768"
        command = [CHROMIUM, *options.split(), f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        own = folder / "DevToolsActivePort"
        port = wait_for(lambda: own.exists() and own.read_text().split(), 30)[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as told:
            (tab,) = [one for one in json.load(told) if one["type"] == "page"]
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=900)
        self.numbers = itertools.count()

    def call(self, method: str, **parameters):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            pass
        return answer["result"]

    def js(self, code: str):
        told = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wrong(self, selector: str) -> list[str]:
        return self.js(WRONG.replace("SELECTOR", selector))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("chromium"))
    yield page
    os.killpg(page.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab started in a copy of notebooks/, so that nothing is saved over."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    options = "--no-browser --allow-root --notebook-dir=notebooks --ServerApp.port=0"
    options += " --IdentityProvider.token= --LabApp.expose_app_in_browser=True"
    command = [sys.executable, "-m", "jupyterlab", *options.split()]
    chosen = root / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    chosen.parent.mkdir(parents=True)
    chosen.write_text('{"windowingMode": "none"}')  # every cell is drawn, also those outside the screen
    log, environment = root / "log", os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(root / "settings")}
    with log.open("w") as target:
        options = {"cwd": root, "env": environment, "stdout": target, "stderr": target}
        server = subprocess.Popen(command, **options, start_new_session=True)
    yield wait_for(lambda: re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/lab", log.read_text()), 120)[0]
    os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_in_jupyterlab(page, lab, path):
    page.call("Page.navigate", url=f"{lab}/tree/{path.name}?reset")
    book = "[...(window.jupyterapp?.shell?.widgets('main') ?? [])].find((one) => one.sessionContext)"
    wait_for(lambda: page.js(f"{book}?.sessionContext?.session?.kernel?.status === 'idle'"), 120)
    page.js(f"window.jupyterapp.shell.activateById({book}.id)")
    assert page.js("window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)")
    state = f"{book}.content.widgets.filter((cell) => cell.model.type === 'code')"
    counts = page.js(f"{state}.map((cell) => cell.model.executionCount)")
    assert counts and None not in counts, "a cell did not run"
    assert not page.wrong(".jp-OutputArea-output, .jp-RenderedMarkdown")


def test_pages_and_index(page, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPKNN_FIGURES", str(tmp_path))
    command = [sys.executable, "-m", "deepknn_lib", "notebooks", "--profile", "smoke", "--only", "00,02,03"]
    subprocess.run(command, check=True, cwd=ROOT)
    pages = [*tmp_path.rglob("*.html")]
    assert len(pages) == 4
    for made in pages:
        page.call("Page.navigate", url=made.as_uri())
        wait_for(lambda: page.js("document.readyState === 'complete'"), 60)
        assert not page.wrong("html, .output_subarea"), made.name
        missing = "[...document.images].filter((image) => !image.naturalWidth).map((image) => image.src)"
        assert not page.js(missing), made.name
