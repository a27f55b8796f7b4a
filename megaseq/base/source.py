"""Where in the source a param is declared, what its docstring says, and who is writing to it now."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import sys
from typing import NamedTuple

_BASE_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Declaration(NamedTuple):
    """One field in the body of a class."""

    line: int
    """1-based line in the file."""
    doc: str
    """The string literal after the field, cleaned; empty when there is none."""


def caller() -> str:
    """Returns `file:line` of the innermost frame outside of `megaseq/base`."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BASE_FOLDER):
        frame = frame.f_back
    return f"{display_path(frame.f_code.co_filename)}:{frame.f_lineno}"


@functools.lru_cache(maxsize=4096)
def _display_path(filename: str, folder: str) -> str:
    absolute = os.path.normpath(os.path.join(folder, filename))
    if absolute.startswith(_PACKAGE_FOLDER):
        return absolute[len(_PACKAGE_FOLDER) :].replace(os.sep, "/")
    if absolute.startswith(folder.rstrip(os.sep) + os.sep):
        return os.path.relpath(absolute, folder).replace(os.sep, "/")
    # Elsewhere: from the outermost package down, so that no text ever holds a path of this machine.
    top = os.path.dirname(absolute)
    while os.path.exists(os.path.join(top, "__init__.py")):
        top = os.path.dirname(top)
    return os.path.relpath(absolute, top).replace(os.sep, "/")


def display_path(filename: str) -> str:
    """Writes a file's path relative to the megaseq package, else to the working directory, else to its own package."""
    if filename.startswith("<"):
        return filename
    return _display_path(filename, os.getcwd())


def declarations(owner: type) -> dict[str, Declaration]:
    """Returns the fields that are written in the body of `owner`; empty when its source cannot be read."""
    filename = _file_of(owner)
    return _declarations_in(filename).get(owner.__qualname__, {}) if filename else {}


def location(owner: type, field: str) -> str:
    """Returns `file:line` of `field` in the body of `owner`."""
    filename = _file_of(owner)
    found = declarations(owner).get(field)
    if filename is None or found is None:
        return f"default of {owner.__qualname__.removesuffix('.Params')}"
    return f"{display_path(filename)}:{found.line}"


def _file_of(owner: type) -> str | None:
    module = sys.modules.get(owner.__module__)
    return getattr(module, "__file__", None)


@functools.cache
def _declarations_in(filename: str) -> dict[str, dict[str, Declaration]]:
    found: dict[str, dict[str, Declaration]] = {}
    for qualname, node in _classes(filename):
        fields: dict[str, Declaration] = {}
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            doc = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                literal = following.value.value
                doc = inspect.cleandoc(literal) if isinstance(literal, str) else ""
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                fields[statement.target.id] = Declaration(statement.lineno, doc)
            elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                fields[statement.targets[0].id] = Declaration(statement.lineno, doc)
        found[qualname] = fields
    return found


@functools.lru_cache(maxsize=16)
def _classes(filename: str) -> list[tuple[str, ast.ClassDef]]:
    try:
        with open(filename, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    found: list[tuple[str, ast.ClassDef]] = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found.append((prefix + child.name, child))
                walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                walk(child, f"{prefix}{child.name}.<locals>.")
            else:
                walk(child, prefix)

    walk(tree, "")
    return found
