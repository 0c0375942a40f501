"""Who may import whom. Every import counts: those inside functions and those for types only, too."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("scaling", "tokenizer_tools", "engine", "evals")

ALLOWED = {
    "errors": set(),
    "version": set(),
    "plugins": {"errors"},
    "scaling": {"errors", "plugins"},
    "tokenizer_tools": {"errors"},
    "engine": {"errors", "version", "scaling", "tokenizer_tools"},
    "evals": {"errors", "version", "plugins", "scaling", "tokenizer_tools", "engine"},
    "server": {"errors", "scaling", "tokenizer_tools", "engine"},
    "cli": {"errors", "version", "scaling", "tokenizer_tools", "engine", "evals", "server"},
}
"""Layers that a layer may import, beside itself. Nothing imports `cli`, and nothing else `server`."""

CLICK = {"cli"}
"""Layers that know click."""


@cache
def modules() -> dict[str, Path]:
    """Every module by its name below `ropewalk`, without the package's root, which names all that is public."""
    files = {file.relative_to(ROOT): file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    package = ROOT / "src" / "ropewalk"
    inside = [*package.glob("*.py"), *package.glob("cli/*.py"), *package.glob("server/*.py")]
    files |= {file.relative_to(package): file for file in inside}
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): file for path, file in files.items()}
    return {name: file for name, file in names.items() if name not in ("__init__", "__main__")}


@cache
def imports(name: str) -> frozenset[str]:
    """What a module imports: modules of ours by their name below `ropewalk`, all others as they are written."""
    file = modules()[name]
    package = ["ropewalk", *name.split(".")]
    if file.name != "__init__.py":
        package.pop()
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *((node.module or "").split(".") if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found.add(inner if inner.removeprefix("ropewalk.") in modules() else origin)
    return frozenset(module.removeprefix("ropewalk.") for module in found)


def layer(name: str) -> str:
    return name.partition(".")[0]


def circles() -> list[set[str]]:
    """Sets of modules that reach each other by imports (strongly connected components, by closure)."""
    graph = {name: imports(name) & modules().keys() for name in modules()}
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        reach[start] = seen
    found = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]}
    return [set(circle) for circle in found]


@pytest.mark.parametrize("name", ALLOWED)
def test_no_import_goes_upward(name: str) -> None:
    upward = {
        f"{module} -> {target}"
        for module in modules()
        if layer(module) == name
        for target in imports(module)
        if target == "ropewalk" or (target in modules() and layer(target) not in {name, *ALLOWED[name]})
    }
    assert not upward


def test_every_module_has_a_layer() -> None:
    assert {layer(module) for module in modules()} == ALLOWED.keys()


def test_tokenizer_tools_import_no_torch() -> None:
    heavy = {m: imports(m) & {"torch", "transformers"} for m in modules() if layer(m) == "tokenizer_tools"}
    assert not {module for module, names in heavy.items() if names}


def test_only_the_command_line_knows_click() -> None:
    assert {layer(module) for module in modules() if "click" in imports(module)} <= CLICK


def test_no_module_imports_itself_by_a_detour() -> None:
    found = circles()
    assert not found
