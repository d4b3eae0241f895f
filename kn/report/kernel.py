"""The Jupyter kernel of a run's notebooks: this very Python, whatever kernelspecs and settings are around."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

START_SECONDS = 180  # a kernel that has not answered by then is given up
# at level ERROR a kernel reports the interrupt that ends every kernel; errors of cells are raised here
COMMAND = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
COMMAND += ["--IPKernelApp.log_level=CRITICAL"]


class OwnKernel(AsyncKernelManager):
    """Starts sys.executable's ipykernel with files in a folder of its own; remembers why it ended."""

    latest: "OwnKernel"  # papermill makes it and keeps it to itself

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        OwnKernel.latest, self.private = self, tempfile.TemporaryDirectory(prefix="kn-kernel-")
        self.connection_file = str(Path(self.private.name) / "kernel.json")
        self.messages = Path(self.private.name) / "stderr"
        self.status: int | None = None

    @property
    def kernel_spec(self) -> KernelSpec:
        """How the kernel is started: COMMAND, instead of the first kernelspec of that name."""
        return KernelSpec(argv=COMMAND, display_name="Python 3", language="python")

    async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
        places = dict.fromkeys(("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"), self.private.name)
        with self.messages.open("w") as stderr:
            options |= {"env": {**options.get("env", os.environ), **places}, "stderr": stderr}
            await super()._async_launch_kernel(kernel_cmd, **options)

    async def _async_is_alive(self) -> bool:
        if self.provisioner is not None and not self.shutting_down:
            self.status = await self.provisioner.poll()
        return await super()._async_is_alive()

    is_alive = _async_is_alive

    def why_ended(self) -> str:
        """Why the kernel does not answer: a signal, its exit status and last words, or the time."""
        lines = self.messages.read_text(encoding="utf-8", errors="replace").splitlines()
        said = next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
        if self.status is None:
            return f"its kernel did not answer within {START_SECONDS} s, run the same command again"
        if self.status < 0:
            reason = f"its kernel was ended by signal {-self.status}, from outside or for want of memory"
            return f"{reason}: run the same command again, with --jobs 1 if it was memory"
        return f"its kernel ended with status {self.status}{said}"
