"""Shared fixtures: tiny models, and the order of the suite (fast files first, the mini run last)."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for variable, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "passive")):
    os.environ.setdefault(
        variable, value
    )  # tiny tensors: waiting threads took four times as long beside another process
ROOT = Path(__file__).parent.parent
LAST = (
    "test_beyond.py",
    "test_jupyter.py",
    "test_hub_datasets.py",
    "test_paper_profile.py",
    "test_run_all.py",
    "test_mini.py",
)
SHARED = ROOT.parent / "shared" / "data"  # real public files, for rehearsals of the paper profile


@pytest.fixture(scope="session")
def rehearsal_mirror(tmp_path_factory):
    """A mirror of the real files in ../shared/data with tiny random models; skips without that folder."""
    if not SHARED.exists():
        pytest.skip("needs the folder ../shared/data of real public files beside the clone")
    import rehearsal

    return rehearsal.build(SHARED, tmp_path_factory.mktemp("rehearsal") / "mirror", tiny=True)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """(store, tables) of the real plan with work that takes milliseconds, which nobody disturbed."""
    import cheap

    return cheap.undisturbed(tmp_path_factory.mktemp("whole"))


TIMED = {
    "seconds": {"lm": 2.0, "lm_ilkd": 3.0, "glue": 1.0, "glue_ilkd": 2.0},
    "flops": {"lm": 1e12, "lm_ilkd": 1.5e12, "glue": 1e12, "glue_ilkd": 1e12},
    "tokens": {"lm": 2000, "lm_ilkd": 2400, "glue": 500, "glue_ilkd": 600},
    "bytes": {"teacher": 5e8, "student": 4.9e8, "baseline": 3.3e8},
    "around": {"lm": 10.0, "lm_ilkd": 10.0, "glue": 1.0, "glue_ilkd": 1.0}, "start": 4.0, "tokenized": 1e6,
    "peak_bytes": 7e9,
    "device": "a machine",
}


def known_speed(home, profile):
    """Put a timing run's answer into the store: at the paper's size the timing itself takes a minute."""
    from kn.suite import devices, timing
    from kn.suite.store import Store

    store = Store(home / "store").open()
    request = timing.timing_request(profile, devices.precision(profile.device))
    timing.timing_file(request, store).write_text(json.dumps(TIMED))


@pytest.fixture(scope="session")
def whole_test_run(tmp_path_factory):
    """Folder with the store and reports of `--profile test --only beyond,claims`.

    With the ledger come all seven tables and every switched reading.
    """
    from kn.suite import profiles

    folder = tmp_path_factory.mktemp("beyond")
    known_speed(folder, profiles.TEST)
    places = {
        "KN_HOME": str(folder / "store"),
        "KN_REPORTS": str(folder / "reports"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "kn", "--profile", "test", "--only", "beyond,claims"]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **places}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return folder


@functools.cache
def kn_is_installed():
    """Whether this checkout's kn is imported in any folder: always in .venv, else maybe."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import kn; print(kn.__file__)"]
    with tempfile.TemporaryDirectory() as folder:
        found = subprocess.run(
            command, cwd=folder, env={**variables, "KN_QUICK_IMPORT": "1"}, capture_output=True, text=True
        )
    installed = found.stdout.strip() == str(ROOT / "kn" / "__init__.py")
    assert installed or Path(sys.prefix) != ROOT / ".venv", found.stderr[-500:]
    return installed


def user_environment(**more):
    """A user's environment: nothing of this test's run, PYTHONPATH only where kn is not installed."""
    ours = ("PYTHONPATH", "KN_QUICK_IMPORT", "KN_SET", "KN_GLUE_SCORES", "KN_READ_ONLY")
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    return variables | ({} if kn_is_installed() else {"PYTHONPATH": str(ROOT)}) | more


def compare_notebook(name, folder, profile="mini", **places):
    """nbval on a copy of a notebook in another folder: its outputs against the committed ones."""
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert 'profile = "mini"' in parameters.source
    parameters.source = parameters.source.replace('"mini"', f'"{profile}"')
    nbformat.write(notebook, folder / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(folder), f"{name}.ipynb"]
    variables = user_environment(**places)
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]


BESIDE = []  # the process that begins mini's stages


def pytest_collection_finish(session):
    """In a whole suite one process makes mini's stages beside the tests; test_mini.py goes on from there."""
    files = {item.path.name for item in session.items}
    if (
        {"test_mini.py", "test_kronecker.py"} <= files
        and not session.config.option.collectonly
        and (os.cpu_count() or 1) > 1
    ):
        reports = tempfile.mkdtemp(prefix="kn-beside-")
        variables = {**os.environ, "KN_REPORTS": reports, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "kn", "--jobs", "1"]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        BESIDE.append((process, reports))


def stop_beside():
    """End that process and its workers; a stage that was under way is made again."""
    for process, reports in BESIDE:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(reports, ignore_errors=True)
    BESIDE.clear()


def pytest_unconfigure():
    stop_beside()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LAST.index(item.path.name) if item.path.name in LAST else -1)


@contextlib.contextmanager
def largest_tensor():
    """A list whose one entry becomes the element count of the largest tensor that an operation inside gives.

    A view counts with its whole storage.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    seen[0] = max(seen[0], tensor.untyped_storage().nbytes() // max(1, tensor.element_size()))
            return out

    seen = [0]
    with Watch():
        yield seen


def tiny_gpt2(labels=0, seed=0, dtype=None, **fields):
    """A GPT-2 of 4 layers, width 8, with non-trivial biases and gains; dropout off."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 50,
        "n_positions": 16,
        "n_embd": 8,
        "n_layer": 4,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = GPT2Config(**{**shape, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **fields})
    if labels:
        config.num_labels = labels
    model = (GPT2ForSequenceClassification if labels else GPT2LMHeadModel)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return (model.to(dtype) if dtype else model).eval()
