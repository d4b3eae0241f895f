"""One stage by several processes: torchrun starts them, each runs the stage's work, the first one's files and metrics count.

Transformers' Trainer sees torchrun's variables and splits each batch among the processes (DistributedDataParallel).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from kn.files import PROJECT_ROOT
from kn.suite.store import Stage, Store

PINNED = "KN_WORKER_GPU"  # set where a worker was given one of several GPUs: the processes of one training need them all
KINDS = ("pretrain", "finetune_lm")  # a fine-tuning on GLUE is small: many of them run side by side instead


def wanted(stage: Stage) -> int:
    """How many processes the stage's resources ask for."""
    return int(json.loads(stage.resources).get("processes", 1)) if stage.kind in KINDS else 1


def error_in(text: str) -> str:
    """The line of a traceback that names the error, or the end of the text."""
    errors = re.findall(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w+(?:Error|Exception|Interrupt): .+)$", text, re.MULTILINE)
    return errors[0] if errors else text.strip()[-300:]


def work(stage: Stage, folder: Path, store: Store) -> dict:
    """The stage's work under torchrun; RuntimeError with the last line of its output where a process failed."""
    (folder / "stage.json").write_text(stage.to_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={wanted(stage)}", "-m", "kn.suite.distributed", str(folder), str(store.home)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH")))), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if variables.pop(PINNED, ""):
        del variables["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"one of {wanted(stage)} processes failed: {error_in(done.stderr)}")
    (folder / "stage.json").unlink()
    metrics = folder / "metrics.json"
    return json.loads(metrics.read_text())


def main(folder: Path, home: Path) -> None:
    """One of the processes."""
    import torch

    from kn.suite.work import WORK

    torch.set_num_threads(1)
    stage, store = Stage.from_json((folder / "stage.json").read_text()), Store(home)
    if os.environ["RANK"] == "0":
        (folder / "metrics.json").write_text(json.dumps(WORK[stage.kind](stage, folder, store)))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            WORK[stage.kind](stage, Path(scratch), store)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
