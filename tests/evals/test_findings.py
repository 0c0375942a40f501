"""The sentences say what the rows say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ropewalk.evals.protocols.effective_length import effective_length, samples_to_decide
from ropewalk.evals.reports.findings import findings
from ropewalk.evals.reports.tables import reach_table
from ropewalk.evals.runs import compare
from ropewalk.evals.runs.compare import Difference
from ropewalk.evals.runs.result import Run

MakeRun = Callable[..., Run]


def said(run: Run) -> str:
    return "\n".join(findings(run))


def reach(run: Run, rope: str) -> tuple[int | None, tuple[int, ...], tuple[int, ...]]:
    found = effective_length(run.rows, compare.deltas(run, run.rows), rope)
    assert found is not None
    return found.length, found.breaks, found.undecided


def test_the_whole_story(smollm_run: Run) -> None:
    untouched, twice, best, against, effective, cost, missing = findings(smollm_run)
    assert untouched == (
        "The untouched model has a loss of 3.480 nats per token (perplexity 32.46) at 8k, its trained length."
    )
    assert twice.startswith(
        "At 16k (2 times the trained length) the loss of the untouched model rises to 6.100 nats per token "
        "(perplexity 445.9), +2.620 (95% interval +2.6"
    )
    assert best.startswith("At 24k, the longest measured, yarn:2 has the lowest loss, 5.900")
    assert "against 7.500 untouched: -1.600 (95% interval" in best
    assert against.startswith("Against the untouched model at its trained length (8k) it is worse: +2.420")
    assert "at most +0.02 nats): the untouched model reaches 10k, fails at " in effective
    assert "; yarn:2 reaches 16k, fails at 24k; " in effective
    assert "linear:2 +0.720" in cost
    assert missing == "Not run: rerope:4k|logn at 24k."


def test_no_method_helped(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 3.9}, "a": {8: 4.0, 16: 4.5}, "b": {8: 5.0, 16: 5.0}})
    assert "At 16k, the longest measured, no method helped: the untouched model has the lowest loss, 3.900" in said(run)
    assert "a fails at 8k, 16k; b fails at 8k, 16k." in said(run)
    assert "Not distinguishable" not in said(run)


def test_within_the_trained_length_nothing_has_to_help(make_run: MakeRun) -> None:
    run = make_run({"none": {4: 3.5}, "a": {4: 3.5}})
    assert "At 4k, the longest measured," in said(run)
    assert "no method helped" not in said(run)


def test_ties_are_told(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 5.0}, "a": {16: 3.600}, "b": {16: 3.601}, "c": {16: 3.8}})
    assert "Not distinguishable from a there: b.\n" in said(run)


def test_winner_that_is_not_distinguishable_from_the_untouched_model(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 3.5}, "a": {16: 3.4995}})
    assert "At 16k, the longest measured, a has the lowest loss" in said(run)
    assert "the two are not distinguishable." in said(run)
    assert "the loss of the untouched model is not distinguishable from that" in said(run)


def test_baseline_that_goes_on_improving(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 3.3}})
    assert "the loss of the untouched model falls to 3.300" in said(run)
    assert "No method was run, only the untouched model." in said(run)
    assert "the untouched model reaches 16k." in said(run)


def test_missing_baseline(make_run: MakeRun) -> None:
    assert "The untouched model was not run, so the methods have no baseline" in said(make_run({"a": {8: 3.5}}))
    assert "Effective length" not in said(make_run({}))


def test_baseline_not_run_at_its_trained_length(make_run: MakeRun) -> None:
    run = make_run({"none": {4: 3.5, 16: 5.0}, "a": {16: 3.6}})
    assert "not run at its trained length (8k), so no difference to it can be given." in said(run)
    assert "Effective length" not in said(run)
    assert "a not measured" in said(run)


def test_no_cost_is_spoken_of_where_nothing_was_measured_within_the_trained_length(make_run: MakeRun) -> None:
    assert "Cost" not in said(make_run({"none": {16: 5.0}, "a": {16: 3.6}}))


def test_missing_cells_with_reason(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 5.0}, "a": {8: 3.5}, "b": {8: 3.5, 16: None}})
    assert "Not run: a at 16k, b at 16k (out of memory)." in said(run)
    assert "No method has a result" not in said(run)
    assert "At 8k, the longest that a method was run at," in said(run)


def test_nothing_measured(make_run: MakeRun) -> None:
    assert findings(make_run({})) == ["No perplexity row has been measured yet."]


def test_only_failures(make_run: MakeRun) -> None:
    assert findings(make_run({"none": {8: None}})) == ["Not run: the untouched model at 8k (out of memory)."]


def test_method_equal_to_the_untouched_model_costs_exactly_nothing(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5}})
    (plain,) = run.rows
    twin = {k: v for k, v in plain.items() if k in ("task", "protocol", "model", "context", "target")}
    twin |= {
        k: v for k, v in plain.items() if k.startswith(("bucket", "text", "trained")) or k in ("samples", "places")
    }
    rest = {k: plain[k] for k in ("tokens", "documents", "loss", "perplexity")}
    run.add(twin | {"rope": "yarn:1", "dtype": "float32", "device": "cpu"}, rest, run.losses(plain))
    assert "yarn:1 exactly nothing" in said(run)


def test_effective_length_by_hand(make_run: MakeRun) -> None:
    run = make_run(
        {"none": {8: 3.5}, "good": {16: 3.51, 32: 3.505}, "late": {4: 3.6, 16: 3.6, 32: 3.5}, "bad": {8: 4.0}}
    )
    k = 1024
    assert reach(run, "none") == (8 * k, (), ())
    assert reach(run, "good") == (32 * k, (), ())
    assert reach(run, "late") == (32 * k, (16 * k,), ())
    assert reach(run, "bad") == (None, (), ())


def test_effective_length_undecided(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5}, "a": {8: 3.5, 16: 3.519}})
    assert reach(run, "a") == (8192, (), (16384,))
    found = effective_length(run.rows, compare.deltas(run, run.rows), "a")
    assert found is not None and f"a reaches 8k, 16k undecided ({found.remedy} would decide it)" in said(run)
    rows = [row | {"samples": 2} for row in run.rows]
    found = effective_length(rows, compare.deltas(run, run.rows), "a")
    assert found is not None and found.remedy.endswith(" samples of a longer text")


@pytest.mark.parametrize(
    ("mean", "low", "high", "expected"),
    [
        (0.00, -0.04, 0.04, 9),  # 2 samples: half as wide is +0.02, which still holds the bound at 8
        (0.10, 0.00, 0.20, 4),  # it fails once the lower bound is above: 2 * (0.1 / 0.08)^2 = 3.1
        (0.02, -0.04, 0.08, None),  # nothing decides it
        (0.0199, -0.04, 0.08, None),
    ],
)
def test_samples_to_decide(mean: float, low: float, high: float, expected: int | None) -> None:
    samples = samples_to_decide(Difference(mean=mean, low=low, high=high), 2)
    assert samples == expected
    if samples is not None:
        shrink = (2 / samples) ** 0.5
        assert mean + (high - mean) * shrink <= 0.02 or mean + (low - mean) * shrink > 0.02


def test_the_reach_table_has_three_states(make_run: MakeRun) -> None:
    run = make_run(
        {"none": {8: 3.5, 16: 5.0}, "a": {8: 3.5, 16: 3.519}, "b": {8: 3.5, 16: 3.5}, "c": {8: 3.9, 16: 3.9}}
    )
    grid = reach_table(run)
    assert grid is not None
    states = {rope: shown for rope, (shown,) in grid.rows}
    assert states["none"].text == "8k (fails at 16k)"
    assert states["a"].main == "8k" and states["a"].small[0].startswith("16k undecided: ")
    assert states["b"].text == "16k or more"
    assert states["c"].text == "fails"


def test_too_few_tokens_for_an_interval(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 5.0}, "a": {8: 3.5, 16: 4.0}}, target=64)
    assert effective_length(run.rows, compare.deltas(run, run.rows), "a") is None
    assert "(too few for an interval)" in said(run)
    assert "istinguishable" not in said(run)
    assert "nan" not in said(run)


def test_settings_are_told_apart(make_run: MakeRun) -> None:
    make_run({"none": {8: 3.5}, "a": {8: 3.6}})
    run = make_run({"none": {8: 2.5}, "a": {8: 2.4}}, text="code", text_sha256="ef" * 32)
    first, second = (
        [s for s in findings(run) if f"on {text}]" in s and "has the lowest loss" in s] for text in ("novel", "code")
    )
    assert "the untouched model has the lowest loss" in first[0]
    assert "a has the lowest loss, 2.400" in second[0]


def test_by_position_speaks_of_positions(make_run: MakeRun) -> None:
    shared = {"protocol": "by-position", "context": 16384, "places": "0:16384", "target": 1024}
    for start, end, plain, scaled in ((4096, 8192, 3.5, 3.51), (8192, 16384, 5.0, 3.5)):
        run = make_run({"none": {16: plain}, "a": {16: scaled}}, bucket_start=start, bucket_end=end, **shared)
    assert "nats per token (perplexity 33.12) in positions 4k-8k." in said(run)
    assert "In positions 8k-16k the untouched model has a loss of 5.000" in said(run)
    assert "In positions 8k-16k, the longest measured, a has the lowest loss" in said(run)
    assert "Effective length" not in said(run)


def test_rows_without_losses_still_speak(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 5.0}, "a": {8: 3.5, 16: 4.0}})
    for file in (run.folder / "losses").iterdir():
        file.unlink()
    assert "a has the lowest loss, 4.000 nats per token (perplexity 54.6), against 5.000 untouched." in said(run)
    assert "interval" not in said(run)


@pytest.mark.parametrize(("loss", "verdict"), [(3.3, "better"), (3.5, "not distinguishable"), (3.7, "worse")])
def test_verdict_against_the_trained_length(make_run: MakeRun, loss: float, verdict: str) -> None:
    run = make_run({"none": {8: 3.5, 16: 9.0}, "a": {16: loss}})
    assert f"Against the untouched model at its trained length (8k) it is {verdict}:" in said(run)


def test_harm_tells_where_it_is_largest(make_run: MakeRun) -> None:
    run = make_run({"yarn:2": {4: 3.6, 8: 3.5}}, protocol="harm")
    for row, kl in zip(run.rows, (0.02, 0.01), strict=True):
        run.copy(row | {"kl": kl, "same_top1": 97.25, "difference": 0.1, "difference_low": 0.08}, None)
    assert findings(run) == [
        "Harm within the trained length, where it is largest: yarn:2 moves the distribution of the next token by "
        "0.0200 nats (KL) at 4k, keeps the likeliest one in 97.2 % of the places, and changes the loss by +0.100 "
        "(too few for an interval)."
    ]


def test_repeat_tells_the_gain_at_the_longest_context(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 1.5, 16: 3.2}, "yarn:2": {16: 1.6}}, protocol="repeat")
    for row in run.rows:
        run.copy(row | {"gain": 2.0, "gain_low": 1.9, "gain_high": 2.1, "fresh_loss": 3.5}, None)
    said, missing = findings(run)
    assert said == (
        "What it gains, at 16k, from a passage that it has read before, nats per token of that passage: the "
        "untouched model +2.000 "
        "(95% interval +1.900 to +2.100), of 3.500; yarn:2 +2.000 (95% interval +1.900 to +2.100), of 3.500."
    )
    assert missing == "Not run: yarn:2 at 8k."
