"""The page of the public interface, made from the docstrings: names of `kn` first, then every public function and class by file."""

from __future__ import annotations

import ast
import inspect
import re
from html import escape

import kn
from kn.files import PACKAGE as FOLDER
from kn.report.pages import inline


def page() -> str:
    """api.html: signatures and docstrings, nothing imported that the interface does not need."""
    from kn.report import site

    first = "".join(_entry(name, str(_signature(getattr(kn, name))), inspect.getdoc(getattr(kn, name)) or "", 3) for name in kn.__all__)
    files = [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(FOLDER.glob("*.py")) if path.stem != "__init__"]
    rest = "".join(_file(path.stem, tree) for path, tree in files)
    names = " · ".join(f'<a href="#{name}">{name}</a>' for name in kn.__all__)
    body = (
        "<p>Made from the docstrings. Shapes stand in brackets, letters are explained where they first appear; every error is one line that says what is wrong and what is allowed.</p>"
        f'<h2 id="public">Public interface</h2><p class="soft">{names}</p>{first}'
        f'<h2 id="files">By file</h2>{rest}'
    )
    return site.page("The interface of kn", body, "", [], menu=[("index.html", "All profiles"), ("#public", "Public interface"), ("#files", "By file")])


def _signature(thing) -> str:
    try:
        return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(thing)))  # annotations are kept as text
    except (TypeError, ValueError):
        return ""


def _entry(name: str, signature: str, text: str, level: int, place: str = "") -> str:
    return f'<h{level} id="{escape(place or name)}"><code>{escape(name)}</code></h{level}><pre class="wrap">{escape(name + signature)}</pre>{_paragraphs(text)}'


def _paragraphs(text: str) -> str:
    """A docstring as HTML: lists aligned by spaces stay as they are."""
    parts = [part for part in inspect.cleandoc(text).split("\n\n") if part.strip()]
    return "".join(f"<pre>{escape(part)}</pre>" if re.search(r"^ |\S {2,}\S", part, re.MULTILINE) else f"<p>{inline(part)}</p>" for part in parts)


def _file(stem: str, tree: ast.Module) -> str:
    """The file's docstring and its public functions and classes with their public methods."""
    parts = [f'<h3 id="{stem}.py">kn/{stem}.py</h3>{_paragraphs(ast.get_docstring(tree) or "")}']
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            parts.append(_entry(node.name, _arguments(node), ast.get_docstring(node) or "", 4, f"{stem}.{node.name}"))
            inner = node.body if isinstance(node, ast.ClassDef) else []
            for method in inner:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
                    parts.append(_entry(f"{node.name}.{method.name}", _arguments(method), ast.get_docstring(method) or "", 4, f"{stem}.{node.name}.{method.name}"))
    return "".join(parts)


def _arguments(node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    return f"({ast.unparse(node.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
