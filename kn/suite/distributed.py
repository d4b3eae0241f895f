"""One stage by several processes under torchrun, among which transformers' Trainer splits each batch."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from kn.files import PROJECT_ROOT
from kn.suite.store import Stage, Store

WORKER_GPU = "KN_WORKER_GPU"  # set where a worker was given one of several GPUs: torchrun needs them all
WORKER = "KN_WORKER"  # process whose torchrun it is
KINDS = ("pretrain", "finetune_lm")  # fine-tunings on GLUE are small: many run side by side instead


def process_count(stage: Stage) -> int:
    """Processes of the stage's training, as hardware.processes asks for."""
    return int(json.loads(stage.resources).get("processes", 1)) if stage.kind in KINDS else 1


def error_line(text: str) -> str:
    """The line of a traceback that names the error, or the end of the text."""
    pattern = r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w+(?:Error|Exception|Interrupt): .+)$"
    errors = re.findall(pattern, text, re.MULTILINE)
    return errors[0] if errors else text.strip()[-300:]


def end_with(parent: int, *others: int) -> None:
    """Exit soon after one of these processes is gone, so that a run that was killed leaves none."""

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            while os.getppid() == parent:
                for pid in others:
                    os.kill(pid, 0)
                time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_torchrun(stage: Stage, folder: Path, store: Store) -> dict:
    """The metrics of a stage whose work torchrun does; RuntimeError with the error of a failed process."""
    description, count = folder / "stage.json", process_count(stage)
    description.write_text(stage.to_json(), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", "kn.suite.distributed", str(folder), str(store.home)]
    paths = os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
    variables = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths, WORKER: str(os.getpid())}
    if variables.pop(WORKER_GPU, ""):
        del variables["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"one of {count} processes failed: {error_line(done.stderr)}")
    description.unlink()
    return json.loads((folder / "metrics.json").read_bytes())


def main(folder: Path, home: Path) -> None:
    """The work of one rank."""
    import torch

    from kn.suite.work import WORK
    torch.set_num_threads(1)
    end_with(os.getppid(), int(os.environ[WORKER]))
    stage = Stage.from_json((folder / "stage.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        is_main = os.environ["RANK"] == "0"
        metrics = WORK[stage.kind](stage, folder if is_main else Path(scratch), Store(home))
        if is_main:
            (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
