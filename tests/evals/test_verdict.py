"""The verdict says what a run shows beyond the trained length, in every case."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from ropewalk.evals.reports.report import print_results, publish, verdict_and_findings
from ropewalk.evals.reports.verdict import verdicts
from ropewalk.evals.runs.result import Run

MakeRun = Callable[..., Run]

INTERVAL = r"\(95% interval [+-]?\d\.\d{3} to [+-]?\d\.\d{3}\)"
SAMPLES = r"--samples \d+ or more would decide it"


def verdict(run: Run) -> str:
    (text,) = verdicts(run)
    assert "nan" not in text
    return text


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
    for text in (*verdicts(run), *verdict_and_findings(run)[1]):
        assert not re.search(r"[Nn]o (method|scaler)|undecided", text), text


@pytest.mark.parametrize(
    ("scaled", "said"),
    [
        ({}, "No scaler was measured there; add --rope auto."),
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


def test_nothing_is_decided(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 3.519}, "a": {16: 3.5185}})
    matches(
        run,
        "Whether toy untouched fails at 16k is undecided: +0.019 I nats per token against itself",
        "; S. Whether a helps there is undecided: ",
    )


def test_too_few_tokens_for_an_interval_is_undecided(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5, 16: 5.0}, "a": {16: 4.0}}, target=64)
    matches(run, "Whether toy untouched fails at 16k is undecided: +1.500 nats per token", "more --samples or --target")
    matches(run, "Whether a helps there is undecided: -1.000 against the untouched model", "more --samples or --target")


def test_nothing_beyond_the_trained_length(make_run: MakeRun) -> None:
    run = make_run({"none": {4: 3.5}, "a": {4: 3.6}, "b": {4: 3.501}})
    matches(
        run,
        "What toy does beyond its trained length 8k was not measured: the longest context was 4k. --lengths 1x,2x",
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
    matches(run, "it was not measured at its trained length 8k", "Add 8k to --lengths. With a the loss at 16k is lower")


def test_a_missing_untouched_model_is_named(make_run: MakeRun) -> None:
    run = make_run({"a": {16: 3.6}})
    matches(run, "The untouched model was not measured at 16k", "add --rope none.")
    run = make_run({"none": {8: 3.5}})
    matches(run, "add --rope none. A does not reach 16k: +0.100 I against the untouched model at 8k.")


def test_every_text_has_a_verdict_of_its_own_and_other_protocols_have_none(make_run: MakeRun) -> None:
    make_run({"none": {8: 3.5, 16: 5.0}})
    make_run({"none": {8: 3.5, 16: 5.0}}, text="code", text_sha256="cd" * 32)
    run = make_run({"none": {8: 3.5}}, protocol="sliding", stride=256)
    assert [text[:7] for text in verdicts(run)] == ["[novel]", "[code] "]


def test_the_verdict_comes_first_on_the_page_and_on_the_screen(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.511, 16: 6.096}, "yarn:2": {16: 3.497}})
    files = publish(run, title="toy")
    page = files[0].read_text("utf-8")
    body = page[page.index("<main>") :]
    assert body.index("Untouched, toy reads") < body.index("<svg") < body.index("What was found") < body.index("<table")
    console = Console(file=io.StringIO(), width=100)
    print_results(run, files, [], console)
    assert console.file.getvalue().strip().startswith("Untouched, toy reads its trained length 8k")
