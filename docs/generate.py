"""Writes the generated parts of the docs: `make docs`. A test fails while they are stale.

python docs/generate.py                    # pages from the code, tables from the runs and counts in docs/results
python docs/generate.py --results          # also the plots of README.md, docs/results.md and docs/contexts.md
python docs/generate.py --families         # also docs/families.md, by patching every architecture (3 minutes)
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import choice_tables
import code_pages
import continuation_tables
import interop_tables
import position_tables
import readme_tables
import reliability_tables
import result_tables
import speed_tables
from families_page import families_page

ROOT = Path(__file__).resolve().parent.parent

PAGES = {
    "docs/cli.md": code_pages.command_help,
    "docs/scalers.md": code_pages.scaler_table,
    "docs/api.md": code_pages.api_page,
}
"""Files that are generated as a whole."""

TABLES = {
    "README.md": readme_tables.tables,
    "docs/choose.md": choice_tables.tables,
    "docs/engine.md": lambda: speed_tables.tables() | interop_tables.quantized_tables(),
    "docs/continuation.md": continuation_tables.tables,
    "docs/results.md": result_tables.tables,
    "docs/contexts.md": result_tables.contexts_tables,
    "docs/export.md": interop_tables.tables,
    "docs/reliability.md": reliability_tables.tables,
}
"""Files of which blocks are generated: those blocks by name."""


def generated() -> dict[Path, str]:
    """Every generated file with what it should hold."""
    found = {ROOT / name: page() for name, page in PAGES.items()}
    for name, tables in TABLES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for block, content in tables().items():
            text = replace_block(text, block, wrapped(content))
        found[ROOT / name] = text
    return found


def wrapped(content: str) -> str:
    """`content` with its prose in lines of at most 100 characters; tables, pictures and code stay as they are."""
    if "```" in content:
        return content
    lines: list[str] = []
    for line in content.splitlines():
        is_prose = len(line) > 100 and not line.startswith(("|", "!", "["))
        lines += textwrap.wrap(line, 100, break_on_hyphens=False, break_long_words=False) if is_prose else [line]
    return "\n".join(lines)


def replace_block(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of block `name` replaced."""
    start, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"there is no block {name!r}")
    return f"{before}{start}\n{content}\n{end}{after}"


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", action="store_true", help="patch every architecture again")
    parser.add_argument("--results", action="store_true", help="draw the plots again")
    arguments = parser.parse_args()
    if arguments.families:
        (ROOT / "docs" / "families.md").write_text(families_page(), encoding="utf-8")
    if arguments.results:
        choice_tables.draw()
        position_tables.draw()
        result_tables.draw()
    for path, content in generated().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
