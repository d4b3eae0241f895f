"""The style sheets of the pages beside this file: TABLE_STYLE goes into notebooks too, PAGE_STYLE is of whole pages."""

from pathlib import Path

_FOLDER = Path(__file__).parent
TABLE_STYLE, PAGE_STYLE = ((_FOLDER / f"{name}.css").read_text(encoding="utf-8") for name in ("table", "page"))
