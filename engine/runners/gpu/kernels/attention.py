"""Attention of single queries on banded keys (`Ops.attention`), in two kernels.

`attend` gives every program a part of the keys that a token sees, for one key-value head and its query heads. The
parts are equal shares of all bands together, so that windows and short bands are shared out as well. `join` adds them
up by their weights.
"""

import triton
import triton.language as tl

from .memory import address_of

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def capped(x, cap):
    """cap * tanh(x / cap). The series keeps the precision of small x, which 1 - 2 / (e^2u + 1) loses."""
    u = x / cap
    square = u * u
    series = u * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return cap * tl.where(square < 0.0625, series, 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0))


@triton.jit
def first_and_count(EDGES, band):
    """The first key of a band, and the number of its keys."""
    first = tl.maximum(tl.load(EDGES + 2 * band), 0)
    return first, tl.maximum(tl.load(EDGES + 2 * band + 1) - first, 0)


@triton.jit
def rotated(first, second, COS, inside, HALF: tl.constexpr):
    """The numbers of rotary pairs, rotated by the cosines at COS and the sines HALF behind them."""
    cos = tl.load(COS, mask=inside, other=0.0)
    sin = tl.load(COS + HALF, mask=inside, other=0.0)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def attend_band(
    peak, weight, mixed, ROW, is_head, QUERY, SHIFTS, ADDRESSES, head, start, stop, scale, softcap, ANCESTORS,
    tree_start, D: tl.constexpr, START: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    NUMBER: tl.constexpr, PRODUCTS: tl.constexpr, D_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the keys [start, stop) of one band to the sums of `attend`.

    Args:
        ROW: the queries [G, 1].
        QUERY: their cosines and sines in this band.
        SHIFTS: the table by which keys rotate, or None.
        KEYS: the number of keys that are read at a time.
        STAGES: the number of reads in flight.
    """
    HALF: tl.constexpr = DIM // 2
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    SECOND: tl.constexpr = 1 if INTERLEAVED else HALF
    d, pair = tl.arange(0, D_BLOCK), tl.arange(0, HALF_BLOCK)
    is_number, is_pair = d < D, pair < HALF
    is_kept = is_number & ((d < START) | (d >= START + DIM))
    in_pair = START + STEP * pair
    if DIM > 0:
        q_inside = is_head[:, None] & is_pair[None]
        q_first = tl.load(ROW + in_pair[None], mask=q_inside, other=0.0).to(tl.float32)
        q_second = tl.load(ROW + (in_pair + SECOND)[None], mask=q_inside, other=0.0).to(tl.float32)
        q_first, q_second = rotated(q_first, q_second, QUERY + pair[None], is_pair[None], HALF)
        q_first, q_second = q_first.to(PRODUCTS), q_second.to(PRODUCTS)
    if DIM < D:
        q_kept = tl.load(ROW + d[None], mask=is_head[:, None] & is_kept[None], other=0.0).to(PRODUCTS)
    keys_row, values_row = head * tl.load(ADDRESSES + 2), head * tl.load(ADDRESSES + 5)
    KEYS_AT = address_of(ADDRESSES, NUMBER) + keys_row * D
    VALUES_AT = address_of(ADDRESSES + 3, NUMBER) + values_row * D
    if NUMBER == tl.int8:
        KEY_SCALES = address_of(ADDRESSES + 1, tl.float32) + keys_row
        VALUE_SCALES = address_of(ADDRESSES + 4, tl.float32) + values_row
    for block in tl.range(start, stop, KEYS, num_stages=STAGES):
        position = block + tl.arange(0, KEYS)
        seen = position < stop
        slot = position
        if ANCESTORS is not None:
            in_tree = position >= tree_start
            slot = tl.where(in_tree, tl.load(ANCESTORS + position - tree_start, mask=seen & in_tree, other=0), slot)
        KEY = KEYS_AT + slot[:, None] * D
        scores = tl.zeros([ROW.shape[0], KEYS], tl.float32)
        if DIM > 0:
            inside = seen[:, None] & is_pair[None]
            first = tl.load(KEY + in_pair[None], mask=inside, other=0.0)
            second = tl.load(KEY + (in_pair + SECOND)[None], mask=inside, other=0.0)
            if SHIFTS is not None:
                TURN = SHIFTS + position[:, None] * DIM + pair[None]
                first, second = rotated(first.to(tl.float32), second.to(tl.float32), TURN, inside, HALF)
            scores = tl.dot(q_first, tl.trans(first.to(PRODUCTS)), scores, input_precision="tf32x3")
            scores = tl.dot(q_second, tl.trans(second.to(PRODUCTS)), scores, input_precision="tf32x3")
        if DIM < D:
            kept = tl.load(KEY + d[None], mask=seen[:, None] & is_kept[None], other=0.0).to(PRODUCTS)
            scores = tl.dot(q_kept, tl.trans(kept), scores, input_precision="tf32x3")
        scores *= scale
        if NUMBER == tl.int8:
            scores *= tl.load(KEY_SCALES + slot, mask=seen, other=0.0)[None]
        if softcap is not None:
            scores = capped(scores, softcap)
        scores = tl.where(seen[None], scores * _LOG2_E, -float("inf"))
        top = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - top[:, None])
        fade = tl.exp2(peak - top)
        weight = weight * fade + tl.sum(p, 1)
        if NUMBER == tl.int8:
            p *= tl.load(VALUE_SCALES + slot, mask=seen, other=0.0)[None]
        v = tl.load(VALUES_AT + slot[:, None] * D + d[None], mask=seen[:, None] & is_number[None], other=0.0)
        mixed = tl.dot(p.to(PRODUCTS), v.to(PRODUCTS), mixed * fade[:, None], input_precision="tf32x3")
        peak = top
    return peak, weight, mixed


@triton.jit(do_not_specialize=["tree_start", "tree_depth"])
def attend(
    Q, ADDRESSES, QUERIES, EDGES, SCALES, SHIFTS, ANCESTORS, MIXED, PEAKS, WEIGHTS, q_stride, tree_start, tree_depth,
    softcap, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, START: tl.constexpr, DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, BANDS: tl.constexpr, NUMBER: tl.constexpr, PRODUCTS: tl.constexpr,
    G_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, TURN_KEYS: tl.constexpr, TURN_STAGES: tl.constexpr,
):  # fmt: skip
    """The part of token `program 2`, key-value head `program 1`, share `program 0`.

    It stores the largest score of every head (as a logarithm to base 2), the sum of the exponentials, and the sum of
    the values weighted by them.

    Args:
        SHIFTS: a pointer or None for each band.
        ANCESTORS, softcap: None without a tree or a cap.
        PRODUCTS: the dtype of the factors of matrix products.
        KEYS, STAGES: keys that are read at a time, and reads in flight; TURN_... of bands that rotate keys.
    """
    share, shares, head, n = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    G: tl.constexpr = H // K
    g, d = tl.arange(0, G_BLOCK), tl.arange(0, D_BLOCK)
    is_head = g < G
    ROW = Q + n * q_stride + (head * G + g[:, None]) * D
    ADDRESSES += n * 6
    EDGES += n * BANDS * 2
    if ANCESTORS is not None:
        ANCESTORS += n * tree_depth
    scale = tl.load(SCALES + n)
    total = 0
    for band in tl.static_range(BANDS):
        total += first_and_count(EDGES, band)[1]
    size = tl.cdiv(tl.cdiv(total, shares), KEYS) * KEYS
    skipped, rest = share * size, size  # of all bands together: keys before this share, and keys of it left
    peak = tl.full([G_BLOCK], -float("inf"), tl.float32)
    weight = tl.zeros([G_BLOCK], tl.float32)
    mixed = tl.zeros([G_BLOCK, D_BLOCK], tl.float32)
    for band in tl.static_range(BANDS):
        first, count = first_and_count(EDGES, band)
        start = first + tl.minimum(skipped, count)
        stop = tl.minimum(start + rest, first + count)
        skipped = tl.maximum(skipped - count, 0)
        rest -= stop - start
        QUERY = QUERIES + (band * tl.num_programs(2) + n) * DIM
        peak, weight, mixed = attend_band(
            peak, weight, mixed, ROW, is_head, QUERY, SHIFTS[band], ADDRESSES, head, start, stop, scale, softcap,
            ANCESTORS, tree_start, D, START, DIM, INTERLEAVED, NUMBER, PRODUCTS, D_BLOCK, HALF_BLOCK,
            KEYS if SHIFTS[band] is None else TURN_KEYS, STAGES if SHIFTS[band] is None else TURN_STAGES,
        )  # fmt: skip
    row = (n * H + head * G + g) * shares + share
    tl.store(PEAKS + row, peak, mask=is_head)
    tl.store(WEIGHTS + row, weight, mask=is_head)
    tl.store(MIXED + row[:, None] * D + d[None], mixed, mask=is_head[:, None] & (d < D)[None])


@triton.jit(do_not_specialize=["shares"])
def join(
    MIXED, PEAKS, WEIGHTS, OUT, shares, D: tl.constexpr, S_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
    SHARES_AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """Add up the parts of D_BLOCK numbers of one head of one token a program."""
    head, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK)
    share, is_number = tl.arange(0, S_BLOCK), d < D
    row = head * shares
    peaks = tl.load(PEAKS + row + share, mask=share < shares, other=-float("inf"))
    top = tl.max(peaks, 0)
    weights = tl.load(WEIGHTS + row + share, mask=share < shares, other=0.0)
    weight = tl.sum(weights * tl.exp2(peaks - top), 0)
    out = tl.zeros([D_BLOCK], tl.float32)
    for block in range(0, shares, SHARES_AT_A_TIME):
        part = block + tl.arange(0, SHARES_AT_A_TIME)
        peak = tl.load(PEAKS + row + part, mask=part < shares, other=-float("inf"))
        here = (peak > -float("inf"))[:, None] & is_number[None]  # shares without keys are not read
        mixed = tl.load(MIXED + (row + part[:, None]) * D + d[None], mask=here, other=0.0)
        out += tl.sum(mixed * tl.exp2(peak - top)[:, None], 0)
    tl.store(OUT + head * D + d, (out / weight).to(OUT.dtype.element_ty), mask=is_number)
