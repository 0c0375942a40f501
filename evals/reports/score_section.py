"""The report's section on retrieval rows of one setting."""

from __future__ import annotations

from collections.abc import Sequence

from ..retrieval.score import ScoreGroup
from .grid import Section, span
from .score_grids import score_grids

_SUITES = {
    "passkey": "A number of five digits stands in a long text of the same few sentences, and is asked for at its end.",
    "niah": "A sentence with a number stands in a real text, and the number is asked for at its end.",
    "kv": "One of many random pairs of a JSON object is asked for.",
    "ruler-11-offline": "Eleven tasks of RULER (arXiv 2404.06654) that need no download, on another text: the scores "
    "are not RULER's. Every task counts alike.",
}


def score_section(setting: ScoreGroup) -> Section:
    """The retrieval rows of one setting."""
    return Section(caption=setting.caption, grids=score_grids(setting), method=_method(setting))


def _method(setting: ScoreGroup) -> dict[str, str]:
    row, rows = setting.rows[0], setting.rows
    depths = ", ".join(f"{depth:g}" for depth in setting.depths) or "chosen by the seed"
    return {
        "Task": _SUITES.get(setting.suite, f"The task {setting.suite} of another package."),
        "Trials": f"{len(rows)} in all, {_range([one['prompt_tokens'] for one in rows])} tokens of prompt",
        "Depths": depths,
        **({"Text": f"{row['text']}, sha256 {row['text_sha256']}"} if row.get("text") else {}),
        "Model": f"{row['model']}, trained length {row['trained_length']:,} tokens, {row['dtype']} on {row['device']}",
        "Intervals": "95%: Wilson's for answers that are right or wrong, bootstrap over trials for the others.",
    }


def _range(values: Sequence[int]) -> str:
    return span([min(values), max(values)] if min(values) < max(values) else [min(values)])
