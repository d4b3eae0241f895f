"""Results on disk: a stage's key, its lock, its manifest and provenance.

A result is the folder `<home>/<kind>/<slug>-<hash>/` with metrics.json, further files, and manifest.json, which is
written last; then one atomic rename makes it real. What has no intact manifest is never read, and no stage begins from
an input one of whose bytes has changed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kn.files import PROJECT_ROOT, file_sha256, json_sha256, store_home
from kn.suite.devices import device_name, peak_bytes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # what more room or another folder mends, wherever it was met
REFUSED = (*FULL, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR)  # and what another folder mends, if it was met in the store
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy", "scikit-learn", "pandas")


@dataclass(frozen=True)
class Stage:
    """One piece of work. `settings` is everything beside the fields that changes the result; not hashed: `cost` in FLOPs, `resources` for the hardware."""

    kind: str
    fields: tuple[tuple[str, object], ...]
    settings: str  # JSON
    inputs: tuple[Stage, ...] = ()
    version: int = 1
    cost: float = field(default=0.0, compare=False)
    resources: str = field(default="{}", compare=False)  # JSON
    steps: int = field(default=0, compare=False)  # of training, for the plan
    tokens: float = field(default=0.0, compare=False)

    @cached_property
    def hash(self) -> str:
        """12 hex digits over kind, fields, settings, version and the inputs' hashes."""
        payload = [self.kind, self.fields, self.settings, self.version, [i.hash for i in self.inputs]]
        return hashlib.sha256(json.dumps(payload).encode()).hexdigest()[:12]

    @property
    def slug(self) -> str:
        """Readable part of the folder's name, also used in logs."""
        return "-".join(str(v) for _, v in self.fields) or "all"

    @property
    def path(self) -> str:
        """Folder relative to the store; ValueError where kind or fields would lead out of it."""
        name = f"{self.slug}-{self.hash}"
        if not self.kind.isidentifier() or name.startswith(".") or "/" in name or not name.isprintable() or len(name.encode()) > 200:
            raise ValueError(f"stage {self.kind[:40]!r} with the fields {self.slug[:40]!r} has no name for a folder: letters, digits and punctuation other than / wanted")
        return f"{self.kind}/{name}"

    def __getitem__(self, name: str):
        return dict(self.fields)[name]

    def to_json(self) -> str:
        """The stage with all its inputs, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Stage:
        """The stage that `to_json` wrote: the same hash."""

        def build(entry: dict) -> Stage:
            return cls(**{**entry, "fields": tuple(map(tuple, entry["fields"])), "inputs": tuple(map(build, entry["inputs"]))})

        return build(json.loads(text))


class StoreError(Exception):
    """A store that cannot be used; the message is one line that says what to do."""


@lru_cache
def environment() -> dict:
    """Versions, device and commit of this process, for provenance."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    try:
        commit = subprocess.run(["git", "-C", str(PROJECT_ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {"packages": found, "python": platform.python_version(), "device": device_name(), "cores": os.cpu_count(), "system": platform.system(), "commit": commit}


class Store:
    """The results below one folder; safe for several processes. StoreError for what cannot be a folder's name."""

    def __init__(self, home: Path | str | None = None):
        wanted = home or store_home()
        if not isinstance(wanted, str | Path) or not str(wanted).isprintable():
            raise StoreError(f"the store {wanted!r} cannot be a folder's name: choose another folder with KN_HOME=…")
        self.home = Path(wanted).absolute()

    def open(self) -> Store:
        """Make the folder and see that it can be written; StoreError otherwise."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            probe = self.home / f".probe-{os.getpid()}"
            probe.write_text("x")
            probe.unlink()
        except OSError as error:
            raise StoreError(f"the store {self.home} cannot be written ({error.strerror}): choose another folder with KN_HOME=…") from None
        return self

    def folder(self, stage: Stage) -> Path:
        """Where the stage's result lies, whether it exists or not."""
        return self.home / stage.path

    def find_corruption(self, stage: Stage, deep: bool = False) -> str | None:
        """None for an intact result, else what is wrong; sizes and metrics.json are always checked, all contents if `deep`."""
        folder = self.folder(stage)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            if manifest.pop("digest", json_sha256(manifest)) != json_sha256(manifest):  # stores of before have none
                return "the manifest has another content than it says"
            for name, (size, digest) in manifest["files"].items():
                path = folder / name
                if path.stat().st_size != size:
                    return f"{name} has another size than the manifest says"
                if (deep or name == "metrics.json") and file_sha256(path) != digest:
                    return f"{name} has another content than the manifest says"
            return None if manifest["hash"] == stage.hash else "the manifest belongs to another stage"
        except FileNotFoundError as error:
            return "not there" if not folder.exists() else f"{Path(error.filename).name} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"the manifest cannot be read ({type(error).__name__})"

    def scratch(self, stage: Stage) -> Path:
        """A folder for checkpoints that outlives a killed run; it goes when the stage is finished."""
        folder = self.folder(stage).with_name(f"{self.folder(stage).name}.work")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def tidy(self, stage: Stage) -> None:
        """Remove the checkpoints of a finished stage, which a run killed just after its last rename leaves."""
        shutil.rmtree(self.folder(stage).with_name(f"{self.folder(stage).name}.work"), ignore_errors=True)

    def has(self, stage: Stage) -> bool:
        """Whether an intact result is there."""
        return self.find_corruption(stage) is None

    def metrics(self, stage: Stage) -> dict:
        """The stage's metrics.json; StoreError where there is no intact one."""
        wrong = self.find_corruption(stage)
        if wrong:
            raise StoreError(f"{stage.path}: {wrong}; run ./run_all.sh to make it again")
        return json.loads((self.folder(stage) / "metrics.json").read_text())

    def record(self, stage: Stage) -> dict:
        """What reports read: kind, fields, metrics, path, provenance, settings and the paths of the inputs."""
        metrics = self.metrics(stage)
        provenance = json.loads((self.folder(stage) / "manifest.json").read_text())["provenance"]
        inputs = [item.path for item in stage.inputs]
        return {"stage": stage.kind, "fields": dict(stage.fields), "metrics": metrics, "path": stage.path, "provenance": provenance, "settings": json.loads(stage.settings), "inputs": inputs}

    def forget(self, stages: list[Stage]) -> None:
        """Remove these results."""
        for item in stages:
            shutil.rmtree(self.folder(item), ignore_errors=True)
            self.tidy(item)

    def make(self, stage: Stage, work) -> bool:
        """Run work(stage, temporary folder, store) -> metrics unless an intact result is there; True if it ran. StoreError where it cannot be written."""
        from filelock import FileLock

        final = self.folder(stage)
        temporary = final.with_name(f"{final.name}.tmp")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(final.with_name(final.name + ".lock")):  # makes the temporary folder ours: what lies there is a dead run's
                if self.find_corruption(stage, deep=True) is None:
                    return False
                for need in stage.inputs:
                    if wrong := self.find_corruption(need, deep=True):
                        raise StoreError(f"{stage.path} needs {need.path}: {wrong}; run ./run_all.sh to make it again")
                for rubbish in (final, temporary):
                    shutil.rmtree(rubbish, ignore_errors=True)
                temporary.mkdir()
                try:
                    started, clock = time.time(), time.monotonic()
                    metrics = work(stage, temporary, self)
                    provenance = {"started": started, "wall_seconds": time.monotonic() - clock, "peak_bytes": peak_bytes(), "cost": stage.cost, **environment()}
                    self._finish(stage, temporary, metrics, provenance)
                    temporary.rename(final)
                    self.tidy(stage)
                except BaseException:
                    shutil.rmtree(temporary, ignore_errors=True)
                    raise
        except Exception as error:
            if reason := unwritable(error, self.home):
                raise StoreError(f"{stage.path} could not be written ({reason}): free some space or choose another folder with KN_HOME=…") from error
            raise
        return True

    @staticmethod
    def _finish(stage: Stage, folder: Path, metrics: dict, provenance: dict) -> None:
        if not isinstance(metrics, dict):
            raise TypeError(f"{stage.path} gave {type(metrics).__name__} for its metrics, a dictionary wanted")
        try:
            text = json.dumps(metrics, indent=1, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"a metric is not a finite number ({error}): the training went wrong, lower its learning rate") from None
        (folder / "metrics.json").write_text(text)
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        files = {p.relative_to(folder).as_posix(): (p.stat().st_size, file_sha256(p)) for p in paths}
        inputs = [i.path for i in stage.inputs]
        manifest = {"kind": stage.kind, "hash": stage.hash, "fields": dict(stage.fields), "settings": json.loads(stage.settings), "inputs": inputs, "files": files, "provenance": provenance}
        part = folder / "manifest.part"
        manifest = json.loads(json.dumps(manifest))  # as it will be read back
        part.write_text(json.dumps({**manifest, "digest": json_sha256(manifest)}, indent=1))
        with part.open() as handle:
            os.fsync(handle.fileno())
        part.rename(folder / "manifest.json")


def unwritable(error: BaseException, home: Path) -> str:
    """Why a write failed where another folder or more room would mend it, else ""; libraries that write for us raise kinds of their own."""
    if isinstance(error, OSError) and error.errno in (REFUSED if str(home) in str(error.filename) else FULL):
        return error.strerror or str(error)
    for number in FULL:
        if not isinstance(error, StoreError) and os.strerror(number) in str(error):
            return os.strerror(number)
    return "a file of it was cut short" if "PytorchStreamWriter failed" in str(error) else ""
