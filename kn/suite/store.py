"""Results on disk: a stage's key, its lock, its manifest.

A result is the folder `<home>/<kind>/<slug>-<hash>/` with metrics.json, further files, and manifest.json,
which is written last; then one atomic rename makes it real. A result without an intact manifest is never
read, and no stage begins from an input of which a byte has changed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from kn.files import file_records, file_sha256, json_sha256, store_home
from kn.suite.devices import peak_bytes
from kn.suite.provenance import environment

# errors that more room or another folder helps against: of any file, and of a file in the store
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
STORE_ERRORS = (*DISK_ERRORS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR)
LOCK_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of flock on some network file systems
MAX_NAME_BYTES = 200  # of a stage's folder
REMAKE, OTHER_FOLDER = "run ./run_all.sh to make it again", "choose another folder with KN_HOME=…"


@dataclass(frozen=True)
class Stage:
    """One step of a run, with everything that its result depends on; `hash` is its key in the store."""

    kind: str
    fields: tuple[tuple[str, object], ...]  # (name, value), distinct for stages of one kind
    settings: str  # JSON: everything else that changes the result
    inputs: tuple[Stage, ...] = ()
    version: int = 1  # bumped by hand where the code changes the result
    # not part of the key:
    cost: float = field(default=0.0, compare=False)  # FLOPs
    resources: str = field(default="{}", compare=False)  # JSON: hardware settings, which change no result
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
        printable = name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES
        if not self.kind.isidentifier() or name.startswith(".") or "/" in name or not printable:
            stage = f"stage {self.kind[:40]!r} with the fields {self.slug[:40]!r}"
            allowed = "letters, digits and punctuation other than / wanted"
            raise ValueError(f"{stage} has no name for a folder: {allowed}")
        return f"{self.kind}/{name}"

    def __getitem__(self, name: str):
        return dict(self.fields)[name]

    def input(self, *kinds: str, **fields) -> Stage:
        """The one input of these kinds and fields; RuntimeError for none or several."""
        found = [i for i in self.inputs if i.kind in kinds and all(i[k] == v for k, v in fields.items())]
        if len(found) != 1:
            problem = f"{self.path} has {len(found)} inputs of kind {' or '.join(kinds)}"
            raise RuntimeError(f"{problem}, expected one")
        return found[0]

    def to_json(self) -> str:
        """The stage with all its inputs, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Stage:
        """The stage that `to_json` wrote: the same hash."""

        def build(entry: dict) -> Stage:
            fields, inputs = tuple(map(tuple, entry["fields"])), tuple(map(build, entry["inputs"]))
            return cls(**{**entry, "fields": fields, "inputs": inputs})

        return build(json.loads(text))


Work = Callable[[Stage, Path, "Store"], dict]  # (stage, folder to write to, store) -> metrics


class StoreError(Exception):
    """A store that cannot be used; the message is one line that says what to do."""


class Store:
    """The results below one folder; safe for several processes. StoreError for an impossible folder name."""

    def __init__(self, home: Path | str | None = None):
        home = home or store_home()
        if not isinstance(home, str | Path) or not str(home).isprintable():
            raise StoreError(f"the store {home!r} cannot be a folder's name: {OTHER_FOLDER}")
        self.home = Path(home).absolute()

    def open(self) -> Store:
        """Create the folder and check that it can be written; StoreError otherwise."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.home) as handle:
                handle.write(b"x")
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCK_ERRORS:
                raise self._no_locks(error) from None
            problem = f"the store {self.home} cannot be written ({error.strerror})"
            raise StoreError(f"{problem}: {OTHER_FOLDER}") from None
        return self

    def _no_locks(self, error: Exception) -> StoreError:
        reason = getattr(error, "strerror", None) or "no flock"
        problem = f"the file system of the store {self.home} refuses locks ({reason})"
        return StoreError(f"{problem}: choose a folder on a local disk with KN_HOME=…")

    def folder(self, stage: Stage) -> Path:
        """Where the stage's result is, whether it exists or not."""
        return self.home / stage.path

    def find_corruption(self, stage: Stage, deep: bool = False) -> str | None:
        """What is wrong with a result, else None; checks sizes and metrics.json, with `deep` all contents."""
        folder = self.folder(stage)
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            # older stores have no digest
            if "digest" in manifest and manifest.pop("digest") != json_sha256(manifest):
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

    def has(self, stage: Stage) -> bool:
        """Whether an intact result is there."""
        return self.find_corruption(stage) is None

    def metrics(self, stage: Stage) -> dict:
        """The stage's metrics.json; StoreError where there is no intact one."""
        if problem := self.find_corruption(stage):
            raise StoreError(f"{stage.path}: {problem}; {REMAKE}")
        return json.loads((self.folder(stage) / "metrics.json").read_bytes())

    def record(self, stage: Stage) -> dict:
        """A result as reports read it: kind, fields, metrics, path, provenance, settings, inputs' paths."""
        metrics = self.metrics(stage)
        provenance = json.loads((self.folder(stage) / "manifest.json").read_bytes())["provenance"]
        return {
            "stage": stage.kind, "fields": dict(stage.fields), "metrics": metrics, "path": stage.path,
            "provenance": provenance, "settings": json.loads(stage.settings),
            "inputs": [item.path for item in stage.inputs],
        }

    def _sibling(self, stage: Stage, suffix: str) -> Path:
        return self.folder(stage).with_name(f"{self.folder(stage).name}.{suffix}")

    def scratch(self, stage: Stage) -> Path:
        """A folder for checkpoints, which survives a killed run until the stage is finished."""
        folder = self._sibling(stage, "work")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def tidy(self, stage: Stage) -> None:
        """Remove a finished stage's scratch folder."""
        shutil.rmtree(self._sibling(stage, "work"), ignore_errors=True)

    def forget(self, stages: list[Stage]) -> None:
        """Remove these results."""
        for item in stages:
            shutil.rmtree(self.folder(item), ignore_errors=True)
            self.tidy(item)

    def make(self, stage: Stage, work: Work) -> bool:
        """Run `work` unless an intact result is there; whether it ran. StoreError: damaged input, no room."""
        from filelock import FileLock
        try:
            self.folder(stage).parent.mkdir(parents=True, exist_ok=True)
            try:
                lock = FileLock(self._sibling(stage, "lock")).acquire()
            except (NotImplementedError, OSError) as error:
                if getattr(error, "errno", errno.ENOSYS) in LOCK_ERRORS:
                    raise self._no_locks(error) from None
                raise
            with lock:
                if self.find_corruption(stage, deep=True) is None:  # another process may have made it
                    return False
                self._make_locked(stage, work)
        except Exception as error:
            if reason := write_failure(error, self.home):
                problem = f"{stage.path} could not be written ({reason})"
                raise StoreError(f"{problem}: free some space or {OTHER_FOLDER}") from error
            raise
        return True

    def _make_locked(self, stage: Stage, work: Work) -> None:
        for item in stage.inputs:
            if problem := self.find_corruption(item, deep=True):
                raise StoreError(f"{stage.path} needs {item.path}: {problem}; {REMAKE}")
        final, temporary = self.folder(stage), self._sibling(stage, "tmp")
        for leftover in (final, temporary):  # the lock is ours, so these are a dead run's
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        try:
            provenance, clock = {"started": time.time()}, time.monotonic()
            metrics = work(stage, temporary, self)
            provenance |= {"wall_seconds": time.monotonic() - clock, "peak_bytes": peak_bytes()}
            _write_result(stage, temporary, metrics, provenance | {"cost": stage.cost} | environment())
            temporary.rename(final)
            self.tidy(stage)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _write_result(stage: Stage, folder: Path, metrics: dict, provenance: dict) -> None:
    """Write metrics.json, then manifest.json over all files."""
    if not isinstance(metrics, dict):
        raise TypeError(f"{stage.path} gave {type(metrics).__name__} for its metrics, must be a dictionary")
    try:
        text = json.dumps(metrics, indent=1, allow_nan=False)
    except ValueError as error:
        remedy = "the training went wrong, lower its learning rate"
        raise ValueError(f"a metric is not a finite number ({error}): {remedy}") from None
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    manifest = {
        "kind": stage.kind, "hash": stage.hash, "fields": dict(stage.fields),
        "settings": json.loads(stage.settings), "inputs": [item.path for item in stage.inputs],
        "files": file_records(folder), "provenance": provenance,
    }
    manifest = json.loads(json.dumps(manifest))  # as it will be read back
    part = folder / "manifest.part"
    part.write_text(json.dumps({**manifest, "digest": json_sha256(manifest)}, indent=1), encoding="utf-8")
    with part.open() as handle:
        os.fsync(handle.fileno())
    part.rename(folder / "manifest.json")


def write_failure(error: BaseException, home: Path) -> str:
    """Why a write failed where another folder or more room would help, else ""; reads messages too."""
    if isinstance(error, OSError):
        in_store = str(home) in str(error.filename)
        if error.errno in (STORE_ERRORS if in_store else DISK_ERRORS):
            return error.strerror or str(error)
    for number in DISK_ERRORS:
        if not isinstance(error, StoreError) and os.strerror(number) in str(error):
            return os.strerror(number)
    return "a file of it was cut short" if "PytorchStreamWriter failed" in str(error) else ""
