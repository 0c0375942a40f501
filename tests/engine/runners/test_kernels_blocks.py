"""Products of every format of weights in blocks with a few vectors, compared with float64."""

import itertools

import numpy as np
import pytest
from kernel_data import FORMATS, address, check_bits, packed

from ropewalk.engine.runners.cpu.kernels import project
from ropewalk.engine.runners.cpu.tables import StoredLinear
from ropewalk.engine.runners.family import LinearLayer


class Case:
    """Matrices, each of its own format, over the same vectors."""

    def __init__(self, names, rows, columns, tokens, biased=False):
        random = np.random.default_rng(0)
        self.x = random.standard_normal((tokens, columns)).astype(np.float32)
        matrices = [packed(random, name, rows, columns) for name in names]
        self.biases = [random.standard_normal(rows).astype(np.float32) if biased else None for _ in names]
        self.layers = [StoredLinear.of(LinearLayer(weight, None)) for weight, _ in matrices]
        self.table = np.array([layer.table for layer in self.layers], np.int64)
        self.table[:, 2] = [address(bias) for bias in self.biases]
        exact = np.concatenate([weights for _, weights in matrices]).astype(np.float64)
        shift = np.concatenate([np.zeros(rows) if bias is None else bias for bias in self.biases])
        self.exact = self.x.astype(np.float64) @ exact.T + shift
        self.size = np.abs(self.x).astype(np.float64) @ np.abs(exact).T + np.abs(shift)

    def run(self, x=None, threads=1):
        x = self.x if x is None else x
        out = np.full((len(x), self.exact.shape[1]), np.nan, np.float32)
        for thread in range(threads):
            project(np.uint8, self.table, np.ascontiguousarray(x), out, thread, threads)
        return out


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", range(1, 10))
def test_products_are_those_of_float64(name, tokens):
    for (columns, rows), biased in itertools.product([(256, 1), (256, 7), (768, 33)], [False, True]):
        case = Case([name], rows, columns, tokens, biased)
        assert (np.abs(case.run() - case.exact) < 3e-7 * case.size).all()


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
