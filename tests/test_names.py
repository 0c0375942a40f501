"""Names and sizes that a reader can rely on: one meaning for a class name, no room too small, short docs."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

import ropewalk as rw

SOURCE = Path(rw.__file__).parent
ROOT = Path(__file__).parent.parent
SMALLEST = 40  # lines of a module that only one other imports
PROSE = 100  # characters of a line of prose


def modules():
    """The source and the tree of every module, by its path in the package, whose folders are links."""
    folders = [path for path in SOURCE.iterdir() if path.is_dir()]
    paths = [
        *SOURCE.glob("*.py"),
        *(folder / p.relative_to(folder.resolve()) for folder in folders for p in folder.resolve().rglob("*.py")),
    ]
    texts = {path.relative_to(SOURCE): path.read_text(encoding="utf-8") for path in paths}
    assert len(texts) > 100
    return {path: (text, ast.parse(text)) for path, text in texts.items()}


def test_no_class_name_stands_for_two_things():
    places = defaultdict(list)
    for path, (_, tree) in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def dotted(path):
    parts = path.with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path, tree):
    """The modules of ours that a module names in its imports."""
    package = path.parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module.split(".") if node.module else ()))
            yield target
            yield from ((*target, alias.name) for alias in node.names)


def test_no_room_is_too_small():
    trees = modules()
    importers = defaultdict(set)
    for path, (_, tree) in trees.items():
        for target in imported(path, tree):
            importers[target].add(path)
    small = {}
    for path, (text, _) in trees.items():
        lines = len(text.splitlines())
        if path.name not in ("__init__.py", "__main__.py") and lines < SMALLEST and len(importers[dotted(path)]) == 1:
            small[str(path)] = lines
    assert small == {}


PAGES = sorted(path for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")] if not path.is_symlink())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_prose_are_short(page):
    text = re.sub(r"^(```|~~~).*?^\1\s*$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    long = [
        line
        for line in text.splitlines()
        if len(line) > PROSE
        and not line.startswith(("|", "    ", "!", "<"))
        and not re.search(r"\]\([^)]*$|https?://", line)
    ]
    assert long == []
