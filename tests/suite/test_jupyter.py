"""A notebook opened as README says: JupyterLab in a real browser, PYTHONPATH unset."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from browser import chromium
from conftest import ROOT, user_environment
from playwright.sync_api import TimeoutError

DISTANCES = """table => [...table.querySelectorAll('tbody tr')].map(row => {
  const middle = node => {
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getClientRects()[0];
    return box.top + box.height / 2;
  };
  return Math.abs(middle(row.querySelector('td.key')) - middle(row.querySelector('.paper, .ours')));
})"""  # pixels between the first lines of a row's label and of its first value


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab whose root holds a copy of table1.ipynb without outputs."""
    root, port = tmp_path_factory.mktemp("lab"), free_port()
    notebook = nbformat.read(ROOT / "notebooks" / "table1.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, root / "table1.ipynb")
    options = {
        "ServerApp.port": port, "ServerApp.port_retries": 0, "ServerApp.root_dir": root,
        "ServerApp.password": "", "IdentityProvider.token": "", "LabApp.news_url": None,
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "data"}
    places |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "KN_HOME": "store", "KN_REPORTS": "reports"}
    settings = user_environment(**{name: str(root / folder) for name, folder in places.items()})
    with (root / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=root, env=settings, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (root / "log").read_text()[-2000:]
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def menu(page, name, entry):
    """Choose an entry of a menu."""
    page.get_by_role("menuitem", name=name, exact=True).click(timeout=20_000)
    page.get_by_role("menuitem", name=entry, exact=True).click(timeout=20_000)


def run_all_cells(page, until):
    """Run all cells by the menu and wait for `until`; on a slow machine JupyterLab first asks for the kernel,
    more than once, and a kernel that it has just replaced forgets what it was asked to run.
    """
    accept = page.locator(".jp-Dialog button.jp-mod-accept")
    idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    deadline, asked = time.monotonic() + 420, -60.0
    while not until.count():
        assert time.monotonic() < deadline, page.locator("body").inner_text()[-2000:]
        with contextlib.suppress(TimeoutError):  # a dialog may open or close under the click: look again
            if accept.count():
                accept.first.click(timeout=5_000)
            elif idle.count() and time.monotonic() - asked > 45:
                menu(page, "Run", "Run All Cells")
                asked = time.monotonic()
        page.wait_for_timeout(500)


def test_table1_in_jupyterlab(lab, tmp_path):
    """Open it, run all cells by the menu, look at the table on the screen."""
    with chromium() as browser:
        # tall: JupyterLab takes cells that are out of sight out of the page
        page = browser.new_context(viewport={"width": 1400, "height": 4000}).new_page()
        page.goto(f"{lab}/lab/tree/table1.ipynb")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=120_000)
        error = page.locator("[data-mime-type='application/vnd.jupyter.error']")
        table = page.locator(".jp-OutputArea .kn table").first
        run_all_cells(page, until=table.or_(error))
        assert not error.count(), error.first.inner_text()[-1000:]
        table.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        page.screenshot(path=tmp_path / "table1.png")
        assert "50257x768" in table.inner_text() and table.bounding_box()["width"] > 400
        apart = table.evaluate(DISTANCES)
        assert len(apart) > 8 and max(apart) < 2  # paper, ours: each label on the line of its value
        page.wait_for_function(
            "document.querySelectorAll('.jp-OutputArea-output pre').length > 0", timeout=60_000
        )
        assert not error.count(), error.first.inner_text()[-1000:]
