"""Processors, GPUs, precision and memory of this machine; imports nothing heavy: planning is quick."""

import contextlib
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Literal

PROCESS_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # of Linux
Precision = Literal["bf16", "fp32"]
# of mpirun, srun, torchrun and accelerate: they make a process one of several that share a batch, or tie
# all of our processes to one processor. SLURM_* stay: submitit alone reads them
LAUNCHER = r"(PMI|PMIX|PMI2|PALS|HYDRA|OMPI|MPI|I_MPI|MV2|TORCHELASTIC|PET|ACCELERATE|FSDP)_.*"
LAUNCHER += r"|((LOCAL|GROUP|ROLE|NODE|CROSS)_)?(WORLD_SIZE|RANK)|ROLE_NAME|MASTER_(ADDR|PORT)"
LAUNCHER += r"|OMP_PLACES|OMP_PROC_BIND|GOMP_CPU_AFFINITY|KMP_AFFINITY"


def forget_launcher() -> None:
    """Remove the variables of a foreign launcher from this process's environment: ours are no ranks."""
    for name in filter(re.compile(LAUNCHER).fullmatch, list(os.environ)):
        del os.environ[name]


def cores() -> int:
    """Processors that this process may use, within a container's quota of processor time."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    files = (_cgroup("cpu", f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    texts = [*_cgroup("", "cpu.max"), *map(" ".join, zip(*files, strict=False))]  # "200000 100000", in µs
    quotas = filter(None, map(re.compile(r"(\d+) (\d+)").fullmatch, texts))  # not "max 100000"
    limits = [math.ceil(int(quota[1]) / int(quota[2])) for quota in quotas]
    return max(1, min([found, *limits]))


def memory_bytes() -> float:
    """Main memory of this machine, or what a container may use of it; infinite where nothing says it."""
    limits = [*_cgroup("", "memory.max"), *_cgroup("memory", "memory.limit_in_bytes")]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        limits.append(str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    return min((float(limit) for limit in limits if limit.isdigit()), default=math.inf)


def _cgroup(controller: str, name: str) -> list[str]:
    """Contents of a file in this process's control groups, of version 2 ("") or 1, and those around them."""
    try:
        groups = [line.split(":", 2) for line in PROCESS_CGROUP.read_text(encoding="utf-8").splitlines()]
        paths = [PurePosixPath(path) for _, names, path in groups if controller in names.split(",")]
        places = {str(place).lstrip("/") for path in paths for place in (path, *path.parents)}
        files = [CGROUPS / controller / place / name for place in sorted(places)]
        return [file.read_text(encoding="utf-8").strip() for file in files if file.is_file()]
    except (OSError, ValueError):  # another system, or one that hides them
        return []


def gpus() -> list[str]:
    """Names of the visible GPUs in the driver's order, from nvidia-smi: planning need not import torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace")
    names = [] if found.returncode else found.stdout.strip().splitlines()
    return names[: len(visible.split(","))] if visible else names


def worker_count(training_bytes: float = 2e9) -> int:
    """Worker processes to run at once: one per GPU, or one per processor as far as trainings fit memory."""
    return len(gpus()) or max(1, int(min(cores(), memory_bytes() // training_bytes)))


def keep_off_gpus(device: str) -> str:
    """Hide the GPUs from a profile for the CPU; returns a line to print where there are any."""
    if device != "cpu" or not (found := gpus()):
        return ""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    reason = "this profile is for the CPU, so that its numbers are the same everywhere"
    return f"{found[0]} is not used: {reason}; --profile midi or paper uses it"


def precision(device: str = "cpu") -> Precision:
    """ "bf16" where the processor, or a GPU that may be used, multiplies it in hardware, else "fp32"."""
    in_hardware = any(flag in _cpuinfo() for flag in ("avx512_bf16", "amx_bf16"))
    return "bf16" if in_hardware or device == "auto" and gpus() else "fp32"


def device_name() -> str:
    """Name of the GPU where this process computes on one, else of the processor."""
    torch = sys.modules.get("torch")  # not imported for this: planning stays quick
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """Processor name as the system gives it."""
    found = re.search(r"^model name\s*: *(.*\S)", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def peak_bytes() -> int:
    """Peak resident memory of this process (ru_maxrss is in KiB, on macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_bytes(folder: Path) -> int:
    """Free space of the file system that holds a folder, or would hold it."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")  # of Linux
    return file.read_text(encoding="utf-8") if file.exists() else ""
