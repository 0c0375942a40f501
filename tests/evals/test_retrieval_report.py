"""Intervals of scores, how far methods reach, and what tables, sentences and plots say of made-up trials."""

import math
import random
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from drawings import texts
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from ropewalk.evals.protocols.effective_length import LEAST_FOUND, reach, trials_to_decide
from ropewalk.evals.reports import style
from ropewalk.evals.reports.findings import retrieval_findings
from ropewalk.evals.reports.retrieval_plots import plot_heat, plot_retrieval
from ropewalk.evals.reports.tables import score_grids, write_tables
from ropewalk.evals.retrieval.score import score, score_groups
from ropewalk.evals.retrieval.tasks import RULER, SUITES
from ropewalk.evals.runs.result import Run
from ropewalk.evals.statistics import mean_score_interval, score_interval, wilson_interval

K = 1024


@pytest.mark.parametrize(("right", "trials"), [(0, 20), (20, 20), (17, 20), (1, 3), (0, 1), (400, 500)])
def test_the_interval_of_a_share_is_wilsons(right, trials):
    z, p = 1.959963984540054, right / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    assert wilson_interval(right, trials) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_scores_of_nothing_and_one_have_wilsons_interval_and_fractions_a_bootstrap():
    assert score_interval([1, 0, 1, 1]) == wilson_interval(3, 4)
    rng = np.random.default_rng(1)
    scores = rng.choice([0, 0.25, 0.5, 1], 40).tolist()
    assert score_interval(scores) == score_interval(scores)
    drawn = [rng.choice(scores, 40).mean() for _ in range(5000)]
    assert score_interval(scores) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.015)
    assert np.isnan(score_interval([0.5, 0.5, 0.5, 0.5, 0.5])).all()
    assert np.isnan(score_interval([0.5, 0.25])).all()


def test_the_interval_over_tasks_is_wilsons_with_the_effective_number_of_trials():
    assert mean_score_interval([[1, 0, 1, 1]]) == wilson_interval(3, 4)
    # alike tasks are nearly one task with all the trials
    alike = mean_score_interval([[1.0] * 10 + [0.0] * 10] * 8)
    assert alike == pytest.approx(wilson_interval(80, 160), abs=1e-3)
    # tasks that are always right or always wrong vary less than a share of a half
    low, high = mean_score_interval([[1.0] * 20] * 4 + [[0.0] * 20] * 4)
    assert low < 0.5 < high
    assert high - low < 0.6 * (alike[1] - alike[0])
    low, high = mean_score_interval([[1.0] * 5] * 11)
    assert (high, low) == (pytest.approx(1), pytest.approx(wilson_interval(55, 55)[0], abs=0.01))


@pytest.mark.parametrize(("chances", "trials"), [([0.95] * 11, 5), ([0.98, 0.9, 0.6, 0.2], 10), ([0.5] * 11, 20)])
def test_intervals_over_tasks_hold_the_mean_as_often_as_they_say(chances, trials):
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(600):
        low, high = mean_score_interval([(rng.random(trials) < chance).astype(float).tolist() for chance in chances])
        held += low <= np.mean(chances) <= high
    assert 0.925 < held / 600 < 0.985


def row(rope="none", context=8 * K, correct=1.0, seed=0, suite="passkey", task=None, depth=0.5, nats=-0.5):
    return {
        "suite": suite,
        "task": task or suite,
        "rope": rope,
        "context": context,
        "depth": depth if suite != RULER else None,
        "seed": seed,
        "model": "toy",
        "text": None,
        "text_sha256": None,
        "dtype": "float32",
        "device": "cpu",
        "trained_length": 8 * K,
        "form": 1,
        "correct": correct,
        "answer_logprob_per_token": nats,
    }


def trials(rope, context, right, of, **options):
    return [row(rope, context, float(seed < right), seed, **options) for seed in range(of)]


def ruler(rope, context, means, of=4):
    return [
        row(rope, context, mean, seed, suite=RULER, task=task)
        for task, mean in zip(SUITES[RULER], means, strict=True)
        for seed in range(of)
    ]


def test_every_task_counts_alike():
    rows = trials("none", K, 1, 2, suite=RULER, task="vt") + trials("none", K, 10, 10, suite=RULER, task="cwe")
    found = score(rows)
    assert found.mean == 0.75
    assert found.trials == 12


def test_the_log_probability_is_a_mean_with_an_interval():
    rng = random.Random(0)
    rows = [row(seed=seed, nats=-rng.random()) for seed in range(40)]
    found = score(rows)
    assert found.nats == pytest.approx(np.mean([r["answer_logprob_per_token"] for r in rows]))
    assert found.nats_interval[0] < found.nats < found.nats_interval[1]
    assert np.isnan(score(rows[:3]).nats_interval).all()


def test_settings_differ_in_any_field_of_the_recipe():
    rows = [r | {"words": "2.2"} for r in trials("none", K, 4, 4, suite="niah")]
    rows += [r | {"words": "3.0", "correct": 0.0} for r in rows]
    rows += [rows[0] | {"tokenizer": "other"}, rows[0] | {"weights": "ab"}]
    assert [s.score("none", K).mean for s in score_groups(rows)] == [1, 0, 1, 1]
    (vt,) = trials("none", K, 1, 1, suite=RULER, task="vt")  # draws no words
    cwe = [vt | {"task": "cwe", "words": version} for version in ("2.2", "3.0")]
    assert [s.tasks for s in score_groups([cwe[0], vt, cwe[1]])] == [["vt", "cwe"]] * 2
    assert len(score_groups([vt, vt | {"form": 2}])) == 2


def reach_of(**right_of_20):
    rows = [r for name, right in right_of_20.items() for r in trials("none", int(name[1:]) * K, right, 20)]
    return reach(score_groups(rows)[0].scores("none"), LEAST_FOUND)


def test_a_length_counts_while_it_and_all_below_keep_the_rule():
    found = reach_of(k2=20, k4=20, k8=16, k16=12)
    assert (found.mean, found.length, found.longest) == (8 * K, 4 * K, 16 * K)
    assert (found.undecided, found.fails, found.trials) == (8 * K, 16 * K, None)  # 80 % is too close
    assert reach_of(k2=20, k4=15, k8=20).mean == 2 * K  # the break at 4k ends it
    assert reach_of(k2=15, k4=20).length is None
    assert reach_of(k2=16).mean == 2 * K  # exactly 80 %
    assert reach_of(k2=16).length is None
    assert str(reach_of(k2=20, k4=20)) == "reaches 4k or more"
    assert str(reach_of(k2=20, k4=2)) == "reaches 2k, fails at 4k"
    assert (reach_of(k2=2).state, str(reach_of(k2=2))) == ("fails", "fails at 2k")
    assert reach_of(k2=19).state == "undecided"


@pytest.mark.parametrize(("right", "trials"), [(19, 20), (2, 2), (14, 20)])
def test_so_many_trials_would_decide(right, trials):
    needed = trials_to_decide(right / trials, 0.8)
    low, high = wilson_interval(round(right / trials * needed), needed)
    assert not low < 0.8 < high
    fewer = int(0.7 * needed)
    low, high = wilson_interval(round(right / trials * fewer), fewer)
    assert low < 0.8 < high


def test_sentences_of_a_passkey_run():
    rows = [
        *trials("none", 8 * K, 20, 20),
        *trials("none", 16 * K, 0, 20),
        *trials("yarn:2", 8 * K, 20, 20),
        *trials("yarn:2", 16 * K, 19, 20),
        *trials("ntk:4", 16 * K, 17, 20),
    ]
    best, reached = retrieval_findings(rows)
    assert best.startswith("passkey: at 16k, the longest measured, yarn:2 is right in 95% (76-99) of 20 trials")
    assert "intervals of the untouched model lie below; intervals overlap with ntk:4." in best
    assert "the score is at least 80%" in reached
    assert "the untouched model reaches 8k, fails at 16k; yarn:2 reaches 8k, 16k undecided (about 28 trials" in reached
    assert "would decide it; by the mean 16k or more); ntk:4 16k undecided (about 246 trials" in reached
    assert any("as few as 5 trials" in said for said in retrieval_findings(rows + trials("none", 4 * K, 5, 5)))
    assert retrieval_findings([{"task": "ppl", "loss": 3.0}]) == []


def test_rulers_rule_is_a_share_of_the_methods_own_score():
    half = [0.5] * 11
    rows = ruler("none", 8 * K, half) + ruler("none", 16 * K, [0.46] * 11) + ruler("yarn:2", 16 * K, half)
    (reached,) = (said for said in retrieval_findings(rows) if "effective length" in said)
    assert "90% of the method's own score at 8k" in reached
    assert "the untouched model 8k undecided (" in reached
    assert "by the mean 16k or more)" in reached
    assert "yarn:2" not in reached  # it has no score at 8k
    rows = ruler("none", 8 * K, half) + ruler("none", 16 * K, [0.44] * 11)
    assert any("by the mean 8k)" in said for said in retrieval_findings(rows))
    rows = ruler("none", 8 * K, [0] * 11) + ruler("none", 16 * K, [0] * 11)
    assert any("the untouched model fails at 8k." in said for said in retrieval_findings(rows))
    part = [r for r in rows if r["task"] in ("vt", "cwe")]
    assert not any("effective length" in said for said in retrieval_findings(part))
    assert any("2 of RULER's tasks" in said for said in retrieval_findings(part))


def tables(rows):
    (group,) = score_groups(rows)
    return score_grids(group)


def test_tables():
    rows = [r for c in (4, 8) for depth in (0.0, 1.0) for r in trials("none", c * K, 15, 20, depth=depth)]
    right, nats = tables([*rows, *trials("rerope:4k|logn", 8 * K, 40, 40)])
    text = right.to_markdown()
    assert "depths 0, 0.5, 1 together; 95% intervals, n=40 trials in each cell" in text
    assert "| `none` | 75% (60-86) | 75% (60-86) |" in text
    assert r"| `rerope:4k\|logn` | not run | 100% (91-100) |" in text
    assert "| `none` | -0.500 (-0.500 to -0.500) |" in nats.to_markdown()
    right, *_ = tables(rows + trials("ntk:2", 8 * K, 1, 2))
    assert "| 50% (9-91), n=2 |" in right.to_markdown()
    all_tasks = ruler("none", 8 * K, [1, 0.5, *[0.25] * 9]) + ruler("none", 4 * K, [1] * 11)[:4]
    over, _, by_task = tables(all_tasks)
    assert "| `none` | not run | 34%" in over.to_markdown()
    assert "| `niah_single_1` | 100% (51-100) | 100% (51-100) |" in by_task.to_markdown()
    assert "| `niah_single_2` | not run | 50% |" in by_task.to_markdown()


def make_run(folder, rows):
    run = Run(folder)
    measured = ("correct", "answer_logprob_per_token")
    for r in rows:
        run.add({k: v for k, v in r.items() if k not in measured}, {k: r[k] for k in measured})
    return run


def test_tables_of_several_settings_stand_below_what_was_asked(tmp_path):
    rows = [*trials("none", 8 * K, 5, 5), row(suite=RULER, task="vt")]
    lines = write_tables(make_run(tmp_path, rows))[0].read_text().splitlines()
    titles = [line.partition(". ")[0] for line in lines if line and not line.startswith("|")]
    of_each = ["Right answers", "Log-probability of the right answer, nats a token"]
    assert titles == [
        "passkey: toy (float32).",
        *of_each,
        "1 of RULER's tasks: toy (float32).",
        *of_each,
        "Effective length",
    ]


def test_plots(tmp_path):
    rows = [r for c in (4, 8, 16) for d in (0.0, 1.0) for r in trials("none", c * K, 24 // c, 6, depth=d)]
    rows += trials("yarn:2", 8 * K, 4, 5, depth=1.0) + ruler("none", 8 * K, [0.3] * 11, of=2)
    run = make_run(tmp_path, rows)
    paths = plot_retrieval(run)
    assert [path.name for path in paths] == [
        f"{stem}.{kind}"
        for stem in ("passkey_heat", "passkey_curve", "ruler_11_offline_heat", "ruler_11_offline_curve")
        for kind in ("png", "svg")
    ]
    for path in paths[::2]:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5
    heat = texts(paths[1])
    assert heat.count("n=6") == 6
    assert heat.count("n=5") == 1
    assert heat.count("not run") == 5
    assert {"none", "yarn:2", "0.80", "0.50", "0.17", "4k", "16k", "depth of the needle"} <= {*heat}
    assert {"0.00", "0.25", "0.50", "0.75", "1.00"} <= {*heat}  # one scale for all
    colour = to_hex(colormaps["Blues"](0.5))  # half the scale, not half of what was measured
    assert f"fill: {colour}" in paths[1].read_text()
    curve = texts(paths[3])
    assert {"none  17%", "yarn:2  80% at 8k", "trained length 8k", "100%"} <= {*curve}
    assert {*SUITES[RULER], "0.30", "n=2"} <= {*texts(paths[5])}
    again = plot_heat(score_groups(run.rows)[0], tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths[:2]]


def test_plots_are_as_wide_as_a_narrow_page_can_show(tmp_path):
    """Panels of several methods lie below one another, and no line crosses the name of the trained length."""
    ropes = ("none", "yarn:2", "linear:2", "self-extend:8,window=2k|logn")
    rows = [r for rope in ropes for c in (2, 4, 8, 16) for d in (0.0, 1.0) for r in trials(rope, c * K, 4, 6, depth=d)]
    paths = plot_retrieval(make_run(tmp_path, rows))
    for svg in paths[1::2]:
        width = float(re.search(r'width="([\d.]+)pt"', svg.read_text())[1])
        assert width == pytest.approx(72 * style.WIDTH)
    names = ET.parse(paths[3]).iter("{http://www.w3.org/2000/svg}text")
    below = {"".join(name.itertext()).strip(): _y(name) for name in names}
    assert below["trained length 8k"] < below["100%"] - 5


def _y(text):
    """Where a text of an SVG is, in points from the top."""
    return float(re.search(r"(?:translate|rotate)\(.*?([\d.]+)\)", text.get("transform"))[1])


def test_an_unfinished_ruler_run_has_no_curve(tmp_path):
    rows = [row(context=c * K, suite=RULER, task=task) for c, task in ((4, "vt"), (8, "cwe"))]
    assert [path.stem for path in plot_retrieval(make_run(tmp_path, rows))] == ["ruler_11_offline_heat"] * 2
    assert any("no method has every task" in said for said in retrieval_findings(rows))
