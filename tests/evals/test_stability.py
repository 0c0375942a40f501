"""The stability run: every kind of request comes up, a leak is told, and none is there."""

import mmap

import pytest
import stability
from click.testing import CliRunner
from stability import Load, Verdict, main, serve

import ropewalk as rw


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rw.load(tiny_folder, max_length=4096)


def test_requests_are_the_same_for_the_same_seed_and_of_every_kind(model, held_out_texts):
    loads = [Load(model, held_out_texts[0], longest=64, seed=seed) for seed in (1, 1, 2)]
    for load in loads:
        for _ in range(30):
            load.request()
    model.rope = None
    first, again, other = (load.kinds for load in loads)
    assert first == again != other
    assert {*first, *other} >= {"generate", "together", "score", "fork", "crop", "close_stream", "cancelled", "rescale"}
    assert all(len(load.sessions) <= 3 for load in loads)


def test_a_leak_is_told(model, held_out_texts, monkeypatch):
    held, request = [], Load.request

    def leaks(self):
        held.append(mmap.mmap(-1, 10_000_000))  # memory of its own, not what the process has and does not use
        held[-1].write(b"x" * 10_000_000)
        request(self)

    monkeypatch.setattr(stability.Load, "request", leaks)
    assert not serve(model, held_out_texts[0], requests=16, longest=16).stable


def test_the_verdict_in_words():
    verdict = Verdict(requests=40, warm_mb=500.0, last_mb=540.4, allowed_mb=20.0)
    assert str(verdict) == (
        "GROWING: 500 MB after the warm-up, 540 MB after 40 requests (+40 MB; 20 are put down to the allocator)"
    )


def test_the_command_prints_a_line_for_every_reading_and_a_verdict(tiny_folder, monkeypatch):
    monkeypatch.setattr(stability.gc, "collect", lambda: None)  # a second each in a large process
    result = CliRunner().invoke(main, [str(tiny_folder), "--requests", "20", "--longest", "16"])
    lines = result.output.splitlines()
    assert lines[0].startswith("    1 requests")
    assert len(lines) == 21
    assert lines[-1].split(":")[0] == ("GROWING" if result.exit_code else "stable")
    grown = Verdict(requests=20, warm_mb=500.0, last_mb=600.0, allowed_mb=20.0)
    monkeypatch.setattr(stability, "serve", lambda *_, **__: grown)
    result = CliRunner().invoke(main, [str(tiny_folder), "--requests", "20", "--longest", "16"])
    assert (result.exit_code, result.output.splitlines()[-1].split(":")[0]) == (1, "GROWING")
    assert CliRunner().invoke(main, ["nowhere-model"]).exit_code == 1


@pytest.mark.slow
def test_memory_stays_where_it_is(model, held_out_texts):
    verdict = serve(model, "\n".join(held_out_texts), requests=64, longest=256, seed=3)
    assert verdict.stable, str(verdict)
