"""The pages of the method's interface, made by pdoc from the docstrings: writes docs/api/.

No search, so no script; nothing is fetched.
"""

import sys
from pathlib import Path

import pdoc

import kn

HERE = Path(__file__).parent
ROOMS = ("kronecker", "models", "distill", "align", "compression")


def main(folder: Path) -> None:
    """Render the pages into a folder."""
    for name in kn.__all__:  # resolved when first used; pdoc looks at the module's dictionary
        setattr(kn, name, getattr(kn, name))
    pdoc.render.configure(search=False, show_source=False, template_directory=HERE / "pdoc")
    pdoc.pdoc("kn", *(f"kn.{room}" for room in ROOMS), output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "api")
