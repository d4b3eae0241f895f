"""The pages of the public interface, made by pdoc from the docstrings of the method's rooms.

`python -m kn.report.interface FOLDER` renders them into a folder; write_interface does so in a process of its
own, and only where the sources have changed.
"""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from kn.files import PACKAGE, PROJECT_ROOT, write_atomic

ROOMS = ("kronecker", "models", "distill", "align", "compression")
STAMP = "source.sha256"
TEMPLATES = Path(__file__).with_name("templates") / "pdoc"


def source_hash() -> str:
    """Hash over the sources of the documented modules and the style of their pages."""
    documented = [path for path in sorted(PACKAGE.rglob("*.py"))
                  if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in ROOMS]
    sources = [PACKAGE / "__init__.py", Path(__file__), TEMPLATES / "custom.css", *documented]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def write_interface(folder: Path) -> None:
    """Writes api/ into a folder of reports, unless it is up to date; a note where that is not possible."""
    target, current = Path(folder) / "api", source_hash()
    stamp = target / STAMP
    if stamp.exists() and stamp.read_text(encoding="utf-8").strip() == current:
        return
    if importlib.util.find_spec("pdoc") is None:
        print("note: pdoc is not installed, the pages of the interface are not written")
        return
    done = subprocess.run([sys.executable, "-m", "kn.report.interface", str(target)], cwd=PROJECT_ROOT,
                          capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"note: the pages of the interface are not written: {reason}")
    else:
        write_atomic(stamp, current + "\n")


def render(folder: Path) -> None:
    """Renders the pages with pdoc, without its search (a script) and without sources."""
    import pdoc

    import kn

    for name in kn.__all__:  # they are resolved when first used; pdoc looks at the module's dictionary
        setattr(kn, name, getattr(kn, name))
    pdoc.render.configure(search=False, show_source=False, template_directory=TEMPLATES)
    pdoc.pdoc("kn", *(f"kn.{room}" for room in ROOMS), output_directory=folder)


if __name__ == "__main__":
    render(Path(sys.argv[1]))
