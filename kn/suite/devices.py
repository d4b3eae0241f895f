"""What this machine computes with: processors, GPUs, precision, memory. Imports nothing heavy, so that planning is quick."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Names of the GPUs that may be used, in the driver's order; asks nvidia-smi, so that planning need not import torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or not shutil.which("nvidia-smi"):
        return []
    found = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    names = found.stdout.strip().splitlines() if found.returncode == 0 else []
    return names[: len(visible.split(","))] if visible else names


def keep_off_gpus(device: str) -> str:
    """Hide the GPUs from a profile that is for the CPU; returns a line to print where there are any."""
    found = gpus() if device == "cpu" else []
    if not found:
        return ""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return f"{found[0]} is not used: this profile is for the CPU, so that its numbers are the same everywhere; --profile midi or paper uses it"


def precision(device: str = "cpu") -> str:
    """ "bf16" where the processor, or the GPU where one may be used, multiplies bfloat16 in hardware, else "fp32"; part of every training stage's key."""
    if device == "auto" and gpus():
        return "bf16"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def device_name() -> str:
    """The GPU where this process computes on one, else the processor."""
    torch = sys.modules.get("torch")  # not imported for this: planning stays quick
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """Processor name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_bytes() -> int:
    """Largest resident memory of this process so far (ru_maxrss is in KiB, on macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
