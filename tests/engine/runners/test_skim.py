"""Skimming: a sample of all tokens equals the full text, and a weight of n equals n equal keys."""

import math

import pytest
import torch
from decoders import DECODERS, IDS, LAYERED, LENGTH, SPECS, TOLERANCE, compiled, difference, in_chunks

import ropewalk as rw
from ropewalk.engine.attention.kernel import AttentionScore
from ropewalk.engine.runners.skim import Sample, SkimAttention
from ropewalk.errors import ConfigError

IDS_LIST = IDS[0].tolist()


@pytest.fixture(scope="module")
def runner():
    return compiled(DECODERS["llama"]())


def everything(stretch):
    """A sample of all tokens, in stretches."""
    far = (LENGTH - 30) // stretch * stretch
    return Sample.of(LENGTH, local=LENGTH - far, far=far, stretch=stretch)


@pytest.mark.parametrize("stretch", [110, 10])
@pytest.mark.parametrize("spec", SPECS)
def test_a_sample_of_all_tokens_equals_the_full_text(runner, spec, stretch):
    runner.use(rw.scaling.parse(spec), LENGTH)
    sample = everything(stretch)
    assert sample.positions.tolist() == list(range(LENGTH))
    assert sample.log_weights.abs().max() == 0
    computed = runner.skim(IDS_LIST, sample, LENGTH)
    assert difference(computed, in_chunks(runner, [1000])) < TOLERANCE


@pytest.mark.parametrize("family", LAYERED)
def test_windows_soft_caps_and_layers_without_rotation(family):
    runner = compiled(DECODERS[family]())
    runner.use(rw.scaling.parse("rerope:20|logn"), LENGTH)
    assert difference(runner.skim(IDS_LIST, everything(10), LENGTH), in_chunks(runner, [1000])) < TOLERANCE


def test_a_sample_is_evenly_spaced_and_has_the_weight_of_all_tokens():
    sample = Sample.of(1000, local=200, far=160, stretch=16)
    assert len(sample.positions) == len(set(sample.positions.tolist())) == 360
    assert sample.positions[:16].tolist() == list(range(16))
    assert sample.positions[-200:].tolist() == list(range(800, 1000))
    gaps = sample.positions.diff()
    assert set(gaps[gaps != 1].tolist()) <= {71, 72, 73}  # (800 - 16) / 9 - 15, rounded
    weights = sample.log_weights.exp()
    assert weights[:4].tolist() == [1] * 4  # attention sinks
    assert float(weights[:160].sum()) == pytest.approx(800)
    assert sample.stretches.unique_consecutive().tolist() == list(range(11))


@pytest.mark.parametrize("spec", ["none", "rerope:20|logn", "dual-chunk", "sink-window:30"])
def test_a_key_has_the_weight_of_that_many_keys(runner, spec):
    """Compared with a softmax over repeated keys."""
    runner.use(rw.scaling.parse(spec), LENGTH)
    sample = Sample.of(LENGTH, local=20, far=40, stretch=10)  # 120 tokens before; each of 36 has the weight of 116 / 36
    sample = Sample(
        positions=sample.positions, stretches=sample.stretches, log_weights=(sample.log_weights > 0) * math.log(3)
    )
    n, rotation = len(sample.positions), runner._rotations[0]
    g = torch.Generator().manual_seed(0)
    heads, dim = 6, runner._decoder.head_dim
    q, k, v = (torch.randn(1, h, n, dim, generator=g) for h in (heads, 2, 2))
    score = AttentionScore(scale=0.3)
    computed = SkimAttention(rotation, sample, q.device).attend(q, k, v, score)
    plain = Sample(positions=sample.positions, stretches=sample.stretches, log_weights=torch.zeros(n))
    for query in (n - 1, n - 20, 15):
        copies = torch.where(
            (sample.stretches != sample.stretches[query]) & (sample.log_weights > 0), 3, 1
        )  # of each key, for this query
        copies[query + 1 :] = 0
        index = torch.arange(n).repeat_interleave(copies)
        index = torch.cat([index[index != query], torch.tensor([query])])
        # a sample may have the same position several times
        repeated = Sample(
            positions=plain.positions[index], stretches=torch.zeros(len(index)), log_weights=torch.zeros(len(index))
        )
        expected = SkimAttention(rotation, repeated, q.device).attend(
            q[:, :, index], k[:, :, index], v[:, :, index], score
        )
        torch.testing.assert_close(computed[:, :, query], expected[:, :, -1], atol=2e-6, rtol=1e-5)


def test_a_sample_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"10 stretches of 16 tokens .* and the last 900 tokens do not fit into 1000"):
        Sample.of(1000, local=900, far=160, stretch=16)
