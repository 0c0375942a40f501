"""The verdict says what a run shows beyond the trained length, in every case."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from ropewalk.evals.reports.report import print_results, publish, verdict_and_findings
from ropewalk.evals.reports.verdict import verdicts
from ropewalk.evals.runs import compare
from ropewalk.evals.runs.compare import MEASURED
from ropewalk.evals.runs.result import Run

MakeRun = Callable[..., Run]

INTERVAL = r"\(95% interval [+-]?\d\.\d{3} to [+-]?\d\.\d{3}\)"
SAMPLES = r"about \d+ samples would decide it"


def verdict(run: Run) -> str:
    (one,) = verdicts(run)
    assert "nan" not in one.text
    assert one.samples is None or "undecided" in one.text
    return one.text


def matches(run: Run, *parts: str) -> None:
    """Every part is in the verdict, in this order; I is an interval, S what would decide it."""
    pattern = ".*".join(re.escape(part).replace("I", INTERVAL).replace("S", SAMPLES) for part in parts)
    assert re.search(pattern, verdict(run)), verdict(run)


def test_a_scaler_repairs_the_model(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.511, 16: 6.096}, "yarn:2": {2: 3.9, 8: 3.53, 16: 3.497}, "linear:2": {16: 4.0}})
    matches(
        run,
        "Untouched, toy reads its trained length 8k and fails at 16k: its loss rises by 2.585 I nats per token.",
        "With yarn:2 the loss at 16k is lower by 2.599 I; it reaches 16k: -0.014 I against the untouched model at 8k.",
        "Within 8k yarn:2 costs 0.019 I (at 8k).",
    )
    assert "undecided" not in verdict(run)


def test_a_scaler_that_may_reach_is_undecided_and_the_samples_are_named(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 6.1}, "yarn:2": {16: 3.519}})
    matches(
        run, "With yarn:2 the loss at 16k is lower by 2.581 I; whether it reaches 16k is undecided: +0.019 I", "; S."
    )


def test_a_scaler_that_helps_and_does_not_reach(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 6.1}, "yarn:2": {16: 3.9}})
    matches(run, "lower by 2.200 I; it does not reach 16k: +0.400 I against the untouched model at 8k.")


def test_it_is_never_said_that_nothing_helps_where_a_scaler_is_better(make_run: MakeRun) -> None:
    """What a demo once ended with: yarn:2 at 16k better than the untouched model at 8k, and no method is shown to."""
    run = make_run({"none": {8: 3.511, 16: 6.096}, "yarn:2": {16: 3.497}, "ntk:4": {16: 4.0}})
    for text in (verdict(run), *verdict_and_findings(run)[1]):
        assert not re.search(r"[Nn]o (method|scaler)|undecided", text), text


@pytest.mark.parametrize(
    ("scaled", "said"),
    [
        ({}, "No scaler was measured there."),
        ({"a": {16: None}}, "No scaler has a loss there: a (out of memory)."),
        ({"a": {16: 4.1}}, "No scaler that was measured helps there: a has +0.200 I against the untouched model."),
        (
            {"a": {16: 4.1}, "b": {16: 4.2}},
            "No scaler that was measured helps there: the best of them, a, has +0.200 I",
        ),
        ({"a": {16: 3.898}}, "Whether a helps there is undecided: -0.002 I against the untouched model; S."),
    ],
)
def test_no_scaler_is_shown_to_help(make_run: MakeRun, scaled: dict[str, dict[int, float]], said: str) -> None:
    matches(make_run({"none": {8: 3.5, 16: 3.9}, **scaled}), "fails at 16k: its loss rises by 0.400 I", said)


def test_the_untouched_model_reaches(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 3.49}, "a": {16: 3.45}})
    matches(
        run,
        "toy reaches 16k without scaling: -0.010 I nats per token against itself at its trained length 8k.",
        "With a the loss at 16k is lower by 0.040 I; it reaches 16k",
    )


def shifted(run: Run, rope: str, context: int, losses: np.ndarray, **fields: object) -> None:
    """Add a row with these losses under `rope`, else as the untouched model's at `context`."""
    plain = next(row for row in run.rows if (row["rope"], row["context"]) == ("none", context))
    recipe = {name: value for name, value in plain.items() if name not in MEASURED}
    measured = {"documents": 1, "tokens": len(losses), "loss": float(losses.mean()), "perplexity": 1.0}
    run.add(recipe | {"rope": rope} | fields, measured, losses)


def test_auto_is_named_with_its_choice_and_is_the_untouched_model_within(make_run: MakeRun) -> None:
    run = make_run({"none": {4: 3.6, 8: 3.5, 16: 6.1}})
    for context in (4, 8):
        shifted(run, "auto", context * 1024, losses_of(run, context), chosen="none")
    shifted(run, "auto", 16384, losses_of(run, 8) - 0.01, chosen="self-extend:8")
    matches(
        run,
        "With auto (self-extend:8) the loss at 16k is lower by 2.610 I; it reaches 16k: -0.010 I",
        "Within 8k auto is the untouched model.",
    )
    assert "undecided" not in verdict(run)


def test_auto_may_be_the_untouched_model_beyond_too(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 3.4}})
    shifted(run, "auto", 16384, losses_of(run, 16), chosen="none")
    matches(run, "toy reaches 16k without scaling", "There auto is the untouched model.")
    assert "helps" not in verdict(run)


def losses_of(run: Run, thousands: int) -> np.ndarray:
    row = next(row for row in run.rows if (row["rope"], row["context"]) == ("none", thousands * 1024))
    losses = run.losses(row)
    assert losses is not None
    return losses


def test_a_scaler_that_is_shown_to_help_comes_before_one_that_may(make_run: MakeRun) -> None:
    """`may` has the lowest loss, and an interval that holds zero."""
    run = make_run({"none": {8: 3.5, 16: 4.0}})
    plain, wide = losses_of(run, 16), np.where(np.arange(1024) < 64, -20.0, 1.0)
    shifted(run, "may", 16384, (plain + wide - wide.mean() - 0.4).astype(np.float32))
    shifted(run, "sure", 16384, plain - 0.3)
    matches(run, "With sure the loss at 16k is lower by 0.300 I; it does not reach 16k")
    shifted(run, "surest", 16384, losses_of(run, 8) + 0.01)
    matches(run, "With surest the loss at 16k is lower by 0.490 I; it reaches 16k")


def test_a_cost_that_is_shown_comes_before_one_that_may_be_larger(make_run: MakeRun) -> None:
    run = make_run({"none": {4: 3.5, 8: 3.5, 16: 5.0}, "a": {16: 3.5}})
    wide = np.where(np.arange(1024) < 64, 20.0, -1.0)
    shifted(run, "a", 4096, (losses_of(run, 4) + wide - wide.mean() + 0.1).astype(np.float32))
    matches(run, "Whether a costs anything within 8k is undecided: +0.100 I at 4k; S.")
    shifted(run, "a", 8192, losses_of(run, 8) + 0.05)
    matches(run, "Within 8k a costs 0.050 I (at 8k).")


def test_a_cost_is_not_denied_where_one_context_is_uncertain(make_run: MakeRun) -> None:
    run = make_run({"none": {4: 3.5, 8: 3.5, 16: 5.0}, "a": {16: 3.5}})
    wide = np.where(np.arange(1024) < 64, 1.0, -0.05)
    shifted(run, "a", 4096, (losses_of(run, 4) + wide - wide.mean() - 0.01).astype(np.float32))
    shifted(run, "a", 8192, losses_of(run, 8))
    matches(run, "Whether a costs anything within 8k is undecided: -0.010 I at 4k; S.")


def test_the_longest_context_with_a_comparison_decides(make_run: MakeRun) -> None:
    """A cell at a longer context, left without its partner, hides nothing."""
    run = make_run({"none": {8: 3.5, 16: 6.1}, "a": {16: 3.5, 32: 3.6}})
    matches(run, "fails at 16k", "With a the loss at 16k is lower by 2.600 I", "At 32k only a was measured.")
    run = make_run({"none": {32: 7.0, 64: 8.0}})
    matches(run, "fails at 32k", "With a the loss at 32k is lower", "At 64k only the untouched model was measured.")


def test_losses_that_are_not_stored_are_not_too_few_tokens(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 5.0}, "a": {16: 4.0}})
    for file in (run.folder / "losses").iterdir():
        file.unlink()
    matches(
        run,
        "fails at 16k is undecided: +1.500",
        "since the losses of the tokens are not stored. Whether a helps there is undecided: -1.000",
    )


def test_cells_that_failed_are_not_called_unmeasured(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: None}})
    matches(run, "beyond its trained length 8k was not measured: no loss of none at 16k (out of memory).")


def test_what_would_decide_can_be_measured(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 6.1}, "yarn:2": {8: 3.5, 16: 3.519}})
    (one,) = verdicts(run)
    assert one.samples is not None and f"about {one.samples} samples" in one.text
    assert (one.ropes, one.contexts) == (("none", "yarn:2"), (8192, 16384))
    change = compare.difference(
        run, *(compare.find_row(run.rows, *at) for at in (("yarn:2", (0, 16384)), ("none", (0, 8192))))
    )
    assert change is not None
    assert change.mean + (change.high - change.mean) / one.samples**0.5 <= 0.02
    assert change.mean + (change.high - change.mean) / (one.samples - 1) ** 0.5 > 0.02


def test_a_text_without_room_for_the_samples_asks_for_a_longer_one(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 6.1}, "yarn:2": {8: 3.5, 16: 3.519}}, samples=216)
    (one,) = verdicts(run)
    assert re.search(r"; about \d+ samples of a longer text would decide it\.", one.text)
    assert one.samples is None and not one.contexts


def test_nothing_has_to_be_measured_where_all_is_decided(make_run: MakeRun) -> None:
    (one,) = verdicts(make_run({"none": {8: 3.5, 16: 6.1}, "yarn:2": {8: 3.5, 16: 3.4}}))
    assert one.samples is None and not one.ropes and not one.contexts


def test_nothing_is_decided(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 3.519}, "a": {16: 3.5185}})
    matches(
        run,
        "Whether toy untouched fails at 16k is undecided: +0.019 I nats per token against itself",
        "; S. Whether a helps there is undecided: ",
    )


def test_too_few_tokens_for_an_interval_is_undecided(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 5.0}, "a": {16: 4.0}}, target=64)
    matches(
        run,
        "Whether toy untouched fails at 16k is undecided: +1.500 nats per token",
        "more samples, or a longer target",
    )
    matches(
        run,
        "Whether a helps there is undecided: -1.000 against the untouched model",
        "more samples, or a longer target",
    )


def test_nothing_beyond_the_trained_length(make_run: MakeRun) -> None:
    run = make_run({"none": {4: 3.5}, "a": {4: 3.6}, "b": {4: 3.501}})
    matches(
        run,
        "What toy does beyond its trained length 8k was not measured: the longest context was 4k.",
        "Within 8k a costs 0.100 I (at 4k). Within 8k b costs nothing that shows: +0.001 I (at 4k).",
    )


@pytest.mark.parametrize(
    ("scaled", "said"),
    [
        ({4: 3.6, 8: 3.51}, "Within 8k a costs 0.100 I (at 4k)."),
        ({8: 3.4}, "Within 8k a costs nothing that shows: -0.100 I (at 8k)."),
    ],
)
def test_the_cost_within_the_trained_length(make_run: MakeRun, scaled: dict[int, float], said: str) -> None:
    run = make_run({"none": {4: 3.5, 8: 3.5, 16: 5.0}, "a": {16: 3.5} | scaled})
    matches(run, "it reaches 16k", said)


def test_a_missing_reference_is_named(make_run: MakeRun) -> None:
    run = make_run({"none": {4: 3.5, 16: 5.0}, "a": {16: 3.6}})
    matches(run, "it was not measured at its trained length 8k", "not known. With a the loss at 16k is lower")


def test_a_missing_untouched_model_is_named(make_run: MakeRun) -> None:
    run = make_run({"a": {16: 3.6}})
    matches(run, "The untouched model (none) was not measured at 16k", "not known. With a the loss there is 3.600.")
    run = make_run({"none": {8: 3.5, 16: None}})
    matches(
        run,
        "The untouched model has no loss at 16k (out of memory), so the gain of scaling is not known.",
        "With a toy does not reach 16k: +0.100 I against the untouched model at 8k.",
    )


def test_every_text_has_a_verdict_of_its_own_and_other_protocols_have_none(make_run: MakeRun) -> None:
    make_run({"none": {8: 3.5, 16: 5.0}})
    make_run({"none": {8: 3.5, 16: 5.0}}, text="code", text_sha256="cd" * 32)
    run = make_run({"none": {8: 3.5}}, protocol="sliding", stride=256)
    assert [one.text[:7] for one in verdicts(run)] == ["[novel]", "[code] "]


def test_the_verdict_comes_first_on_the_page_and_on_the_screen(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.511, 16: 6.096}, "yarn:2": {16: 3.497}})
    files = publish(run, title="toy")
    page = files[0].read_text("utf-8")
    body = page[page.index("<main>") :]
    assert body.index("Untouched, toy reads") < body.index("<svg") < body.index("What was found") < body.index("<table")
    console = Console(file=io.StringIO(), width=100)
    print_results(run, files, [], console)
    assert console.file.getvalue().strip().startswith("Untouched, toy reads its trained length 8k")
