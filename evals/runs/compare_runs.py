"""Compare two runs: find the rows that measured the same, and compute their paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ...errors import DataError
from ...scaling import format_length
from ..reports.grid import Grid, Shown
from ..retrieval.score import MEASURED as TRIAL_MEASURED
from ..statistics import paired_difference, paired_score_interval
from .compare import MEASURED, Difference
from .result import Row, Run

_LOSS = (
    *("task", "protocol", "text_sha256", "target", "samples", "stride", "text_tokens", "judge"),
    *("context", "bucket_start", "bucket_end"),
)
_TRIALS = ("suite", "task", "text_sha256", "form", "context")
_TRIAL = ("depth", "seed", "prompt_sha256")
_TOKENIZER = ("model", "tokenizer")  # models of the same name have the same tokenizer
_MAY_DIFFER = MEASURED | TRIAL_MEASURED | {*_TRIAL, "text"}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A measurement that both runs have.

    Args:
        what: for display: `fixed-target at 8k`.
        ropes: the scalers of both. They are equal unless each run has only one.
        unit: of the values: nats per token, bits per byte, or the share of right answers.
        difference: B minus A with its interval; None if the tokens cannot be paired.
    """

    what: str
    ropes: tuple[str, str]
    unit: str
    a: float
    b: float
    difference: Difference | None

    @property
    def rope(self) -> str:
        """`yarn:4`, or `yarn:2 against yarn:4`."""
        first, second = self.ropes
        return first if first == second else f"{first} against {second}"

    @property
    def verdict(self) -> str:
        """`A better`, `B better`, `the same`, or `not distinguishable`."""
        if self.difference is None or not self.difference.has_interval:
            return "no interval"
        if self.difference.low == self.difference.high == 0:
            return "the same"
        if not self.difference.is_distinguishable:
            return "not distinguishable"
        b_is_higher = self.difference.low > 0
        return "B better" if b_is_higher == (self.unit == RIGHT) else "A better"


NATS, BITS, RIGHT = "nats per token", "bits per byte", "right answers"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Pairs in the order of run A, and the number of rows of each run without a partner."""

    pairs: list[Pair]
    only_a: int
    only_b: int

    def grid(self) -> Grid:
        """A table with a line for every pair."""
        rows = [(pair.rope, [Shown(main=text) for text in _texts(pair)]) for pair in self.pairs]
        return Grid(
            title="B minus A",
            note="Paired on the same tokens or trials, with 95% intervals.",
            columns=("what", "A", "B", "unit", "difference", "verdict"),
            rows=rows,
        )


def compare_runs(a: Run, b: Run) -> Comparison:
    """Pair the rows of two runs that measured the same on the same text under the same scaler.

    Two runs with one scaler each are a comparison of these scalers. Any two runs may differ in
    model and dtype. Losses are paired if both runs scored the same tokens. Otherwise the bits per
    byte of both are shown.

    Raises:
        DataError: several rows of a run could be the partner of one row.
    """
    one_scaler_each = all(len({row["rope"] for row in run.rows if _is_compared(row)}) == 1 for run in (a, b))
    rope = () if one_scaler_each else ("rope",)
    pairs, matched = [], [0, 0]
    groups_a, groups_b = (_groups(run.rows, rope) for run in (a, b))
    for identity, rows_a in groups_a.items():
        rows_b = groups_b.get(identity, [])
        for partners_a, partners_b in _partners(rows_a, rows_b):
            for run, rows in ((a, partners_a), (b, partners_b)):
                _refuse_ambiguous_rows(run, rows)
            if "suite" in rows_a[0]:
                both = _same_trials(partners_a, partners_b)
                pair, counts = _trials(both) if both else None, (len(both), len(both))
            else:
                pair, counts = _losses(a, b, partners_a[0], partners_b[0]), (len(partners_a), len(partners_b))
            if pair is not None:
                pairs.append(pair)
                matched = [matched[0] + counts[0], matched[1] + counts[1]]
    return Comparison(pairs=pairs, only_a=_count(groups_a) - matched[0], only_b=_count(groups_b) - matched[1])


Groups = dict[tuple[object, ...], list[Row]]


def _groups(rows: Iterable[Row], rope: tuple[str, ...]) -> Groups:
    """Rows of one loss, or all trials of one task and length."""
    groups: Groups = {}
    for row in rows:
        if _is_compared(row):
            fields = (*(_TRIALS if "suite" in row else _LOSS), *rope)
            groups.setdefault(tuple(row.get(field) for field in fields), []).append(row)
    return groups


def _is_compared(row: Row) -> bool:
    """False for rows that others are made of, such as the judge's."""
    return "suite" in row or row.get("task") == "ppl"


def _count(groups: Groups) -> int:
    return sum(map(len, groups.values()))


def _partners(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[list[Row], list[Row]]]:
    """Groups of rows that end at the same places of the text. Trials name no places, so they all
    match.

    Another tokenizer has other places. If each run has only one place, its rows are partners too.
    """
    by_place_a, by_place_b = _by_place(a), _by_place(b)
    partners = [(rows, by_place_b[place]) for place, rows in by_place_a.items() if place in by_place_b]
    if (
        not partners
        and len(by_place_a) == len(by_place_b) == 1
        and any(a[0].get(name) != b[0].get(name) for name in _TOKENIZER)
    ):
        return [(list(a), list(b))]
    return partners


def _by_place(rows: Sequence[Row]) -> dict[object, list[Row]]:
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("places"), []).append(row)
    return groups


def _refuse_ambiguous_rows(run: Run, rows: Sequence[Row]) -> None:
    """Raise DataError if rows differ in a field that must be equal to choose a partner."""
    fields = {field for row in rows for field in row} - _MAY_DIFFER
    for field in sorted(fields):
        values = list(dict.fromkeys(str(row.get(field)) for row in rows))
        if len(values) > 1:
            what = f"{rows[0].get('protocol') or rows[0]['task']} at {format_length(rows[0]['context'])}"
            raise DataError(
                f"{run.folder} has rows of {what} with {field} {' and '.join(values)}, so it is unknown which to "
                "compare; measure each with its own --out, or delete the lines of one in a copy of the folder"
            )


def _losses(run_a: Run, run_b: Run, a: Row, b: Row) -> Pair | None:
    if a.get("loss") is None or b.get("loss") is None:
        return None
    bucket = f" {format_length(a['bucket_start'])}-{format_length(a['bucket_end'])}" if a.get("bucket_end") else ""
    what, ropes = f"{a['protocol']} at {format_length(a['context'])}{bucket}", (a["rope"], b["rope"])
    losses_a, losses_b = run_a.losses(a), run_b.losses(b)
    if losses_a is None or losses_b is None or not _same_tokens(a, b, losses_a.shape == losses_b.shape):
        bits = a.get("bits_per_byte"), b.get("bits_per_byte")
        if None in bits:
            return None
        return Pair(what=what, ropes=ropes, unit=BITS, a=bits[0] or 0.0, b=bits[1] or 0.0, difference=None)
    mean, low, high = paired_difference(losses_b, losses_a)
    difference = Difference(mean=mean, low=low, high=high)
    return Pair(what=what, ropes=ropes, unit=NATS, a=a["loss"], b=b["loss"], difference=difference)


def _same_tokens(a: Row, b: Row, equal_count: bool) -> bool:
    """Rows of versions before `tokens_sha256` are compared by the number of tokens and by their
    places."""
    known = a.get("tokens_sha256"), b.get("tokens_sha256")
    if None not in known:
        return known[0] == known[1]
    return equal_count and a.get("places") == b.get("places")


def _same_trials(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The trials that both runs have, with equal prompts."""
    trials_b = {tuple(row.get(field) for field in _TRIAL): row for row in b}
    return [(row, trials_b[key]) for row in a if (key := tuple(row.get(field) for field in _TRIAL)) in trials_b]


def _trials(both: Sequence[tuple[Row, Row]]) -> Pair:
    a, b = both[0]
    first, second = ([float(pair[side]["correct"]) for pair in both] for side in (0, 1))
    low, high = paired_score_interval(second, first)
    return Pair(
        what=f"{a['task']} at {format_length(a['context'])}, n={len(both)}",
        ropes=(a["rope"], b["rope"]),
        unit=RIGHT,
        a=fmean(first),
        b=fmean(second),
        difference=Difference(mean=fmean(second) - fmean(first), low=low, high=high),
    )


def _texts(pair: Pair) -> tuple[str, ...]:
    values = (f"{value:.0%}" if pair.unit == RIGHT else f"{value:.4f}" for value in (pair.a, pair.b))
    change = "–" if pair.difference is None else str(pair.difference)
    return pair.what, *values, pair.unit, change, pair.verdict
