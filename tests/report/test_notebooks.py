"""The notebooks are thin, parameterised and checked; what they print is compared by nbval."""

import ast
import re
from statistics import median

import nbformat
import pytest
from conftest import ROOT

FOLDER = ROOT / "notebooks"
BEYOND = ["beyond_alignment", "beyond_compression"]
NAMES = ["00_start_here", *(f"table{number}" for number in range(1, 8)), *BEYOND, "claims"]


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def python(cell):
    """The cell's syntax tree; lines with a magic are left out."""
    return ast.parse("\n".join(line for line in cell.source.split("\n") if not line.startswith("%")))


def test_all_notebooks_are_there():
    assert set(NAMES) <= {path.stem for path in FOLDER.glob("*.ipynb")}


@pytest.mark.parametrize("name", NAMES)
def test_valid_with_the_metadata_papermill_needs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.language == "python"
    assert notebook.metadata.language_info.name == "python"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name):
    cells = code_cells(read(name))
    assert [cell for cell in cells if "parameters" in tags(cell)] == cells[:1]
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in python(cells[0]).body}
    assert values == {"profile": "mini", "seeds": 1, "only": None}


@pytest.mark.parametrize("name", NAMES)
def test_thin(name):
    cells = code_cells(read(name))
    for cell in cells:
        assert len(cell.source.splitlines()) <= 12
        assert not [node for node in ast.walk(python(cell))
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)]
    assert median(len(cell.source.splitlines()) for cell in cells) <= 6


@pytest.mark.parametrize("name", NAMES)
def test_at_least_one_cell_is_compared(name):
    checked = [cell for cell in code_cells(read(name)) if cell.outputs and cell.execution_count
               and "nbval-ignore-output" not in tags(cell)]
    assert checked, (f"{name}.ipynb has no cell with outputs that nbval compares: execute it and commit its "
                     "outputs")


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_clean(name):
    for cell in code_cells(read(name)):
        for output in cell.outputs:
            assert output.output_type != "error", f"{name}.ipynb was committed with a traceback"
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"/(?:home|root|tmp|Users)/",
                                 text), f"{name}.ipynb shows a path of the machine it ran on"


@pytest.mark.parametrize("number", range(1, 8))
def test_each_notebook_makes_its_own_table(number):
    source = "\n".join(cell.source for cell in code_cells(read(f"table{number}")))
    assert f"tables=[{number}]" in source and f"report.table({number}, records, profile)" in source
    assert f"report.write_table({number}, records, profile, stages.report_folder(profile))" in source


@pytest.mark.parametrize("name", BEYOND)
def test_each_notebook_beyond_the_tables_makes_its_own(name):
    source = "\n".join(cell.source for cell in code_cells(read(name)))
    assert f'tables=["{name}"]' in source and f'report.beyond_table("{name}", records)' in source
    assert f'report.beyond_claims("{name}", records)' in source
    assert f'report.write_beyond("{name}", records, profile, stages.report_folder(profile))' in source
