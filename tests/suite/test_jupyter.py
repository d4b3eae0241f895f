"""Notebooks opened as README says: JupyterLab in a real browser, kernels in another folder, no PYTHONPATH."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from browser import chromium
from conftest import ROOT

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def environment(whole_test_run, tmp_path_factory):
    """A user's: no PYTHONPATH, nothing of the run that started this test; a store with the profile `test`."""
    home = tmp_path_factory.mktemp("user")
    ours = ("PYTHONPATH", "KN_QUICK_IMPORT", "KN_SET", "KN_GLUE_SCORES")
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    variables |= {"KN_HOME": str(whole_test_run / "store"), "KN_REPORTS": str(home / "reports")}
    found = subprocess.run(
        [sys.executable, "-c", "import kn; print(kn.__file__)"],
        cwd=home,
        env=variables,
        capture_output=True,
        text=True,
    )
    if found.returncode and Path(sys.prefix) != ROOT / ".venv":
        pytest.skip(
            "kn is not installed in this environment (KN_PYTHON): python -m pip install -e . --no-deps"
        )
    assert found.returncode == 0, found.stderr[-500:]
    return variables


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def lab(environment, tmp_path_factory):
    """The address of a JupyterLab whose root holds copies of the notebooks: running one saves it."""
    root, port = tmp_path_factory.mktemp("lab"), free_port()
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += [
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        f"--ServerApp.root_dir={root}",
    ]
    command += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    settings = {
        **environment,
        "JUPYTER_CONFIG_DIR": str(root / "config"),
        "JUPYTER_RUNTIME_DIR": str(root / "runtime"),
    }
    settings |= {"JUPYTER_DATA_DIR": str(root / "data"), "JUPYTERLAB_SETTINGS_DIR": str(root / "settings")}
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


def test_table1_in_jupyterlab(lab, tmp_path):
    """Open it, run all cells by the menu, look at the table on the screen."""
    with chromium() as browser:
        page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
        page.goto(f"{lab}/lab/tree/notebooks/table1.ipynb?reset")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
        page.locator(".jp-NotebookPanel-toolbar .jp-KernelName, .jp-Toolbar-kernelName").first.wait_for(
            timeout=60_000
        )
        page.get_by_role("menuitem", name="Edit", exact=True).click()
        page.get_by_role("menuitem", name="Clear Outputs of All Cells").click()
        assert page.locator(".jp-OutputArea .kn table").count() == 0
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        error = page.locator("[data-mime-type='application/vnd.jupyter.error']")
        table = page.locator(".jp-OutputArea .kn table").first
        table.or_(error).first.wait_for(timeout=180_000)
        assert not error.count(), error.first.inner_text()[-1000:]
        table.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        page.screenshot(path=tmp_path / "table1.png")
        assert "50257x768" in table.inner_text() and table.bounding_box()["width"] > 400
        page.wait_for_function(
            "document.querySelectorAll('.jp-OutputArea-output pre').length > 0", timeout=60_000
        )
        assert not error.count(), error.first.inner_text()[-1000:]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_from_a_foreign_folder(environment, tmp_path, name):
    """Every notebook, executed where it was copied to, in the seconds-long profile."""
    source = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in source.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace('profile = "mini"', 'profile = "test"')
    nbformat.write(source, tmp_path / f"{name}.ipynb")
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        "--inplace",
        f"{name}.ipynb",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made = nbformat.read(tmp_path / f"{name}.ipynb", as_version=4)
    shown = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("text/html" in output.get("data", {}) for output in shown)
