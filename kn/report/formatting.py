"""Numbers as a reader sees them, names of files and anchors, cautions about a run."""

import math
from typing import Any


def format_number(value: Any, sign: bool = False, points: bool = False) -> str:
    """Three to five digits (percentage points: two decimals) with a real minus; NaN and None as ""."""
    if isinstance(value, str | bool) or value is None:
        return "" if value is None else str(value)
    if math.isnan(value):
        return ""
    size = abs(value)
    if points:
        text = f"{size:.2f}"
    elif size >= 1000 or isinstance(value, int) or (float(value).is_integer() and not 0 < size < 100):
        text = f"{size:,.0f}"
    else:
        text = f"{size:.1f}" if size >= 100 else f"{size:.2f}" if size >= 1 else f"{size:.3g}"
    return ("−" if value < 0 else "+" if sign else "") + text.replace("e-0", "e-")


def format_range(low: float, high: float, sign: bool = False, points: bool = False) -> str:
    """An interval, "1.09 … 1.10"; "" where there is none."""
    return "" if math.isnan(low) else " … ".join(format_number(end, sign, points) for end in (low, high))


def format_deviation(sd: float, value: str) -> str:
    """A standard deviation with as many decimals as the formatted value has."""
    decimals = len(value.partition(".")[2])
    text = f"{sd:,.{decimals}f}"
    return text if text.strip("0.") else f"<{10**-decimals:.{decimals}f}"


def file_stem(key: int | str) -> str:
    """The name of a table's files: table4, beyond_alignment, claims."""
    return key if isinstance(key, str) else f"table{key}"


def anchor(record: dict, depth: int | None = None) -> str:
    """The anchor of a stage, shared by its seeds; with a depth, the anchor of a group of stages."""
    parts = [record["stage"], *(str(value) for key, value in record["fields"].items() if key != "seed")]
    return "-".join("".join(c if c.isalnum() or c == "_" else "_" for c in part) for part in parts[:depth])


def distinct(values: Any) -> str:
    """The different non-empty values, joined by commas."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


def cautions(records: list[dict], profile: str) -> list[str]:
    """What a reader must know before any number: stand-in data, another corpus, mixed versions."""
    found = [] if profile == "paper" else [f"{profile}: documentation text, not the paper's data"]
    if any(record["metrics"].get("as_committed") is False for record in records):
        found.append("the text of this run is not the committed corpus (other package versions?): numbers "
                     "may differ from the committed ones")
    if any(record["metrics"].get("weights") == "random" for record in records):
        found.append("a rehearsal: models with random weights and partly carved data, the numbers mean "
                     "nothing")
    packages = [record["provenance"].get("packages") or {} for record in records]
    for name in ("torch", "transformers"):
        versions = sorted({str(entry[name]) for entry in packages if entry.get(name)})
        if len(versions) > 1:
            found.append(f"stages were made with {name} {' and '.join(versions)}: numbers of one table may "
                         "differ for that alone; make all with one, in a store of its own (KN_HOME=…)")
    return found
