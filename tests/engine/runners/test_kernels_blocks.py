"""Products of every format of weights in blocks with a few vectors, compared with float64."""

import itertools

import numpy as np
import pytest
from kernel_data import FORMATS, PLAIN, address, check_bits, packed, products

from ropewalk.engine.runners.cpu.tables import StoredLinear
from ropewalk.engine.runners.family import LinearLayer


class Case:
    """Matrices, each of its own format, over the same vectors."""

    def __init__(self, names, rows, columns, tokens, biased=False, rounds=2):
        random = np.random.default_rng(0)
        self.x = random.standard_normal((tokens, columns)).astype(np.float32)
        matrices = [packed(random, name, rows, columns) for name in names]
        self.biases = [random.standard_normal(rows).astype(np.float32) if biased else None for _ in names]
        self.layers = [StoredLinear.of(LinearLayer(weight, None)) for weight, _ in matrices]
        self.table = np.array([layer.table(rounds) for layer in self.layers], np.int64)
        self.table[:, 2] = [address(bias) for bias in self.biases]
        exact = np.concatenate([weights for _, weights in matrices]).astype(np.float64)
        shift = np.concatenate([np.zeros(rows) if bias is None else bias for bias in self.biases])
        self.weights = exact
        self.exact = self.x.astype(np.float64) @ exact.T + shift
        self.size = np.abs(self.x).astype(np.float64) @ np.abs(exact).T + np.abs(shift)

    def run(self, x=None, threads=1):
        x = self.x if x is None else x
        out = np.full((len(x), self.exact.shape[1]), np.nan, np.float32)
        products(self.table, np.ascontiguousarray(x), out, threads)
        return out


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", range(1, 10))
def test_products_are_those_of_float64(name, tokens):
    for (columns, rows), biased in itertools.product([(256, 1), (256, 7), (768, 33)], [False, True]):
        case = Case([name], rows, columns, tokens, biased)
        assert (np.abs(case.run() - case.exact) < 3e-7 * case.size).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_a_step_rounds_vectors_to_16_bits(name, tokens):
    """The products are those of float64 with the rounded vectors. The parts have very different sizes."""
    case = Case([name], 9, 768, tokens, rounds=1)
    case.x *= np.float32(10) ** np.repeat(np.arange(-12, 12, dtype=np.float32), 32)
    case.x[-1, 64:96] = 0
    parts = case.x.reshape(tokens, -1, 32)
    greatest = np.abs(parts).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = np.nan_to_num(np.rint(parts * (np.float32(32767) / greatest))).astype(np.float64)
    vectors = (whole * (greatest * np.float32(1 / 32767))).reshape(tokens, -1)
    if name in PLAIN:
        vectors = case.x.astype(np.float64)
    size = np.abs(case.x).astype(np.float64) @ np.abs(case.weights).T
    assert (np.abs(case.run() - vectors @ case.weights.T) < 1e-6 * size).all()


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_leaves_no_finite_product(rounds, wrong):
    case = Case(FORMATS, 9, 512, 5, rounds=rounds)
    case.x[2, 300] = wrong
    found = case.run()
    assert not np.isfinite(found[2]).any()
    assert np.isfinite(np.delete(found, 2, 0)).all()


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.endswith("_K")])
def test_blocks_of_32_may_be_odd_in_number(name):
    case = Case([name], 9, 96, 5)
    assert (np.abs(case.run() - case.exact) < 3e-7 * case.size).all()


def test_matrices_of_a_projection_have_their_own_formats():
    case = Case(FORMATS, 9, 512, 6, True)
    for threads in (1, 2, 3, 7):
        assert (np.abs(case.run(threads=threads) - case.exact) < 3e-7 * case.size).all()


def test_bits_of_a_token_do_not_depend_on_other_tokens_or_threads():
    case = Case(FORMATS, 19, 512, 9, True)
    check_bits(case.run, case.x)
