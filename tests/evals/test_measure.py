"""How cells are run: hard limits, what an earlier run has measured, the bar, and Ctrl-C."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from ropewalk.evals.models.measured import ForwardCost
from ropewalk.evals.runs import measure, progress
from ropewalk.evals.runs.cell import Cell
from ropewalk.evals.runs.measure import measure_all
from ropewalk.evals.runs.progress import RunProgress
from ropewalk.evals.runs.result import Run
from ropewalk.scaling.rope import Scaler

MODEL = SimpleNamespace(cost=ForwardCost(dense=1.0, attention=0.0), restore=lambda: None, under=lambda scaler: None)


class Clocked(Cell):
    """Four windows of ten tokens; each takes `seconds` of a clock that stands otherwise."""

    scaler = Scaler()

    def __init__(self, context, clock, seconds=1.0, stop=False):
        self.context, self._clock, self._seconds, self._stop = context, clock, seconds, stop

    pass_lengths = (10,) * 4

    def row_recipes(self):
        return [{"context": self.context}]

    def measure(self, model, run, advance):
        if self._stop:
            raise KeyboardInterrupt
        for _ in self.pass_lengths:
            self._clock[0] += self._seconds
            advance(0, 10)
        return [run.add(self.row_recipes()[0], {"loss": 1.0})]

    def outcome(self, rows):
        return "measured"


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    return now


def screen():
    return Console(file=io.StringIO(), width=200, force_terminal=False)


def contexts(cells):
    return [cell.context for cell in cells]


def test_a_cell_that_would_end_too_late_is_not_begun_and_a_running_one_is_given_up(tmp_path, clock):
    run = Run(tmp_path)
    cells = [Clocked(1, clock), Clocked(2, clock, seconds=3.0), Clocked(3, clock)]
    outcome = measure_all(MODEL, cells, run, screen(), deadline=1009.0, is_hard=True)
    assert contexts(outcome.measured) == [1]
    assert contexts(outcome.left_out) == [2, 3]  # 2 was expected to end at 1008, and is cut at 1007
    assert clock[0] == 1007.0
    assert len(run.rows) == 1
    assert contexts(measure_all(MODEL, cells, run, screen(), deadline=1100.0).measured) == [2, 3]


def test_without_a_hard_limit_a_running_cell_is_finished(tmp_path, clock):
    outcome = measure_all(MODEL, [Clocked(1, clock, seconds=3.0)], Run(tmp_path), screen(), deadline=1002.0)
    assert contexts(outcome.measured) == [1]
    assert outcome.rate == pytest.approx(40 / 12)


def test_a_resumed_run_says_what_it_found(tmp_path, clock):
    run, console = Run(tmp_path), screen()
    measure_all(MODEL, [Clocked(1024, clock)], run, console)
    assert "before" not in console.file.getvalue()
    measure_all(MODEL, [Clocked(1024, clock), Clocked(2048, clock)], run, console)
    assert f"1 of 2 cells were measured before, in {tmp_path}: none at 1k." in console.file.getvalue()


def test_ctrl_c_says_what_is_stored(tmp_path, clock):
    run = Run(tmp_path)
    with pytest.raises(KeyboardInterrupt, match=r"^nothing was finished, so nothing is stored$"):
        measure_all(MODEL, [Clocked(1, clock, stop=True)], run, screen())
    with pytest.raises(
        KeyboardInterrupt, match=r"^1 finished row is stored in .*; the same command continues from there"
    ):
        measure_all(MODEL, [Clocked(1, clock), Clocked(2, clock, stop=True)], run, screen())


def test_ctrl_c_at_the_moment_a_row_is_written(tmp_path, clock):
    class Interrupted(Clocked):
        def measure(self, model, run, advance):
            super().measure(model, Run(run.folder), advance)  # in the file, and `run` does not know it yet
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^1 finished row is stored"):
        measure_all(MODEL, [Interrupted(1, clock)], Run(tmp_path), screen())


def test_the_bar_goes_to_the_limit_or_to_the_end(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with RunProgress(console, deadline=400.0) as bar:
        (task,) = bar._progress.tasks
        clock, drawn = bar._progress.columns[-1], bar._progress.columns[2]
        assert clock.render(task).plain == "0:00:00 of at most 0:05:00"
        bar.expect(None)
        now[0] = 160.0
        assert clock.render(task).plain == "0:01:00 of at most 0:05:00, 0:04:00 left"
        assert drawn.render(task).percentage_completed == pytest.approx(20)
        bar.expect(1000.0)
        assert "0:04:00 left" in clock.render(task).plain
        bar.expect(220.0)
        assert "0:01:00 left" in clock.render(task).plain
        assert drawn.render(task).percentage_completed == pytest.approx(50)


def test_where_the_screen_is_no_terminal_only_the_lines_are_printed():
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    with RunProgress(console) as bar:
        bar.describe("none at 256")
        bar.print("a line")
        bar.expect(None)
    assert console.file.getvalue() == "a line\n"


def test_a_log_is_told_every_five_minutes_how_long_it_takes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    with RunProgress(console) as bar:
        bar.describe("none at 32k")
        for now[0] in (100.0, 299.0, 300.0, 400.0, 601.0):
            bar.expect(now[0] + 1200.0)
    assert console.file.getvalue().splitlines() == [
        "  none at 32k: 0:05:00, 0:20:00 left",
        "  none at 32k: 0:10:01, 0:20:00 left",
    ]
