"""Products of every kind of weights with a few vectors, compared with float64."""

import numpy as np
import pytest
from kernel_data import KINDS, address, check_bits, from_python, products, stored

from ropewalk.engine.runners.cpu.kernels import product
from ropewalk.engine.runners.cpu.kernels.linear import rows_of

CODES = {np.float32: 0, np.int8: 24, np.uint16: 30}


class Case:
    """Linear layers over the same vectors, their table, and their results."""

    def __init__(self, kind, rows, columns, tokens, biased, seed=0):
        random = np.random.default_rng(seed)
        self.kind, self.rows = kind, rows
        self.x = random.standard_normal((tokens, columns)).astype(np.float32)
        matrices = [stored(random, kind, r, columns) for r in rows]
        biases = [random.standard_normal(r).astype(np.float32) if biased else None for r in rows]
        self.table = np.array(
            [
                [address(w), address(s), address(b), *w.shape, 0, product(CODES[kind]), 0]
                for (w, s, _), b in zip(matrices, biases, strict=True)
            ],
            np.int64,
        )
        self.alive = matrices, biases
        exact = np.concatenate([m for *_, m in matrices])
        shift = np.concatenate([np.zeros(r) if b is None else b for r, b in zip(rows, biases, strict=True)])
        self.exact = self.x.astype(np.float64) @ exact.T + shift
        self.size = np.abs(self.x).astype(np.float64) @ np.abs(exact).T + np.abs(shift)

    def run(self, x=None, threads=1):
        x = self.x if x is None else x
        out = np.full((len(x), sum(self.rows)), np.nan, np.float32)
        products(self.table, x, out, threads)
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", range(1, 10))
def test_products_are_those_of_float64(kind, biased, tokens):
    for columns, rows in ((16, [1]), (48, [7, 24, 3]), (176, [33, 8])):
        case = Case(kind, rows, columns, tokens, biased)
        assert (np.abs(case.run() - case.exact) < 3e-7 * case.size).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_row_do_not_depend_on_other_rows_or_threads(kind):
    case = Case(kind, [19, 8], 80, 9, True)
    check_bits(case.run, case.x)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 97, 1000])
@pytest.mark.parametrize("parts", [1, 2, 3, 8, 200])
def test_parts_of_rows_cover_each_row_once(count, parts):
    shares = [from_python(rows_of)(part, parts, count) for part in range(parts)]
    assert [row for share in shares for row in range(*share)] == list(range(count))
    assert all(start % 8 == 0 for start, stop in shares if start < stop)
