"""The exact text behind a row: a trial's prompt, or the windows of a perplexity row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...errors import DataError
from ..data import Text, load_text
from ..protocols.by_name import PROTOCOLS, protocol, settings_of
from ..protocols.longppl import LongPPL
from ..protocols.perplexity_cell import Source, places_of
from ..protocols.protocol import Window, tokens_sha256
from ..retrieval.trial import rebuild
from ..runs.result import Row


def passages_of(row: Row, rows: Iterable[Row], tokenizer: Any) -> list[str]:
    """What the model read for `row`: one text for each forward pass.

    A trial's prompt is checked by its sha256. Windows are checked by the text's sha256, by where they end, and by the
    sha256 of the scored tokens; not by the last in rows of before it was stored, and in those of `longppl`, whose
    judge chose among the tokens.

    Args:
        rows: of the whole run: the longest context of a run may decide where its windows end.
        tokenizer: the model's.

    Raises:
        DataError: the row has no text, or it would come out otherwise than it was.
    """
    if "suite" in row:
        return [rebuild(row, tokenizer).prompt]
    if row.get("task") != "ppl" or row.get("protocol") not in PROTOCOLS:
        raise DataError(f"a row of task {row.get('task')!r} has no text of its own")
    text = load_text(row["text"])
    if text.sha256 != row["text_sha256"]:
        raise DataError(f"the text {text.name} has sha256 {text.sha256}, the row was measured on {row['text_sha256']}")
    longest = sorted({other["context"] for other in rows if isinstance(other.get("context"), int)})
    for context in (row["context"], *longest):
        try:
            windows = _windows(row, max(context, row["context"]), text, tokenizer)
        except DataError:
            continue
        if row["places"] in (places := places_of(windows), places.partition(", sha256 ")[0]):  # older rows have no hash
            _check_tokens(row, windows)
            return [tokenizer.decode(ids) for w in windows for ids in (w.ids, w.twin) if ids is not None]
    raise DataError(
        f"the windows of this row ended at {row['places']}, and do not come out so again; take the tokenizer of "
        f"{row['model']}, the versions in env.json and all rows of the run"
    )


def _check_tokens(row: Row, windows: Sequence[Window]) -> None:
    """Raise DataError if the row scored other tokens than these windows would."""
    if row["protocol"] == LongPPL.name or row.get("tokens_sha256") is None:
        return
    start, end = row["bucket_start"] or 0, row["bucket_end"]
    found = tokens_sha256([token for w in windows for token in w.ids[max(w.first, start) : end]])
    if found != row["tokens_sha256"]:
        raise DataError(
            f"the row scored other tokens (sha256 {row['tokens_sha256']}) than come out now ({found}); take the "
            f"tokenizer of {row['model']} and the versions in env.json"
        )


def _windows(row: Row, longest: int, text: Text, tokenizer: Any) -> list[Window]:
    settings = {name: row[name] for name in settings_of(row["protocol"]) if name != "judge"}
    chosen = protocol(row["protocol"], tuple(dict.fromkeys((row["context"], longest))), **settings)
    source = Source.of(text, tokenizer, chosen)
    return chosen.windows(source.documents, row["context"], source.start)
