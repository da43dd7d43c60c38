"""Programs in Triton that `TritonKernels` launches, most of them one per token.

Separate from triton.py, which allocates and launches. A row's offset is int64, because m·v can exceed 2³¹. There are no
atomics: every sum has a fixed order.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

TURN = tl.constexpr(8)  # tokens that `add_rows` loads at once
FLOOR = tl.constexpr(-3.0e38)  # below every logit, but finite: merging never subtracts infinities


@triton.jit
def _cap(u, SOFTCAP: tl.constexpr):
    """Returns z, the logit u after the softcap, and dz/du."""
    tanh = 1 - 2 / (tl.exp(u * (2 / SOFTCAP)) + 1)  # exp overflows to the right limit
    return tanh * SOFTCAP, 1 - tanh * tanh


@triton.jit
def _logits(logits, row, target, columns, v, wide, SOFTCAP: tl.constexpr):
    """Loads z and, with a softcap, dz/du of some columns of a row; the target's z is exact, and z = -inf beyond v.

    Rows are padded to `wide` columns, a whole number of vectors; the content of the padding is ignored.
    """
    z = tl.load(logits + columns, mask=columns < wide, other=0)
    z = tl.where(columns == row, target, tl.where(columns < v, z, 0))
    slope = z
    if SOFTCAP is not None:
        z, slope = _cap(z, SOFTCAP)
    return tl.where(columns < v, z, -float("inf")), slope


@triton.jit
def _maximum(logits, row, target, v, wide, SOFTCAP: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns a row's largest z, and with FIRST its first column."""
    lanes = tl.arange(0, COLUMNS)
    largest, first = tl.full([COLUMNS], FLOOR, dtype=logits.dtype.element_ty), lanes
    for start in range(0, v, COLUMNS):
        z, _ = _logits(logits, row, target, start + lanes, v, wide, SOFTCAP)
        if FIRST:
            first = tl.where(z > largest, start + lanes, first)
        largest = tl.maximum(largest, z)
    maximum = tl.max(largest, 0)
    best = row
    if FIRST:
        best = tl.min(tl.where(largest == maximum, first, 2147483647), 0).to(row.dtype)
    return maximum, best


@triton.jit
def _sums(
    logits, factors, row, target, shift, v, wide,
    SOFTCAP: tl.constexpr, LOGIT_SUM: tl.constexpr, WEIGHTED: tl.constexpr, WRITE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Returns sum, logit_sum and weighted of a row, and stores its factors. One pass over the logits."""
    lanes = tl.arange(0, COLUMNS)
    zero = tl.zeros([COLUMNS], dtype=logits.dtype.element_ty)
    total, logit_sum, weighted = zero, zero, zero
    for start in range(0, v, COLUMNS):
        columns = start + lanes
        z, slope = _logits(logits, row, target, columns, v, wide, SOFTCAP)
        exponential = tl.exp(z - shift)
        total += exponential
        finite = tl.where(columns < v, z, 0)
        if LOGIT_SUM:
            logit_sum += finite
        if WEIGHTED:
            weighted += finite * exponential
        if WRITE:
            if SOFTCAP is not None:
                exponential *= slope
            factor = tl.where(columns == row, 0, exponential)
            tl.store(factors + columns, factor.to(factors.dtype.element_ty), mask=columns < wide)
    return tl.sum(total, 0), tl.sum(logit_sum, 0), tl.sum(weighted, 0)


@triton.jit
def exponentials(
    logits, logits_stride, factors, factors_stride, statistics, rows, targets, m, v, wide,
    SOFTCAP: tl.constexpr, LOGIT_SUM: tl.constexpr, METRICS: tl.constexpr, WRITE: tl.constexpr,
    HIGHEST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes one token's statistics [k, m], see `Objective.statistics`, and its factors.

    Without metrics it reads the logits once. The shift is then the largest of the first columns and the target, and in
    the rare case that some z is far above it, a second pass takes the maximum.
    """
    token = tl.program_id(0).to(tl.int64)
    logits += token * logits_stride
    factors += token * factors_stride
    row, target = tl.load(rows + token), tl.load(targets + token)
    if METRICS:
        shift, best = _maximum(logits, row, target, v, wide, SOFTCAP, True, COLUMNS)
    else:
        z, _ = _logits(logits, row, target, tl.arange(0, COLUMNS), v, wide, SOFTCAP)
        shift = tl.maximum(tl.max(z, 0), FLOOR)
    own = target
    if SOFTCAP is not None:
        own, _ = _cap(target, SOFTCAP)
    if not METRICS:
        shift = tl.where(row >= 0, tl.maximum(shift, own), shift)
    total, logit_sum, weighted = _sums(
        logits, factors, row, target, shift, v, wide, SOFTCAP, LOGIT_SUM, METRICS, WRITE, COLUMNS
    )
    if not METRICS:  # noqa: SIM102  # decided when this is compiled
        if total > HIGHEST:  # also if it is infinite
            shift, best = _maximum(logits, row, target, v, wide, SOFTCAP, False, COLUMNS)
            total, logit_sum, weighted = _sums(
                logits, factors, row, target, shift, v, wide, SOFTCAP, LOGIT_SUM, METRICS, WRITE, COLUMNS
            )
    statistics += token
    tl.store(statistics, shift)
    tl.store(statistics + m, total)
    tl.store(statistics + 2 * m, tl.where(row >= 0, own, 0))
    if LOGIT_SUM:
        tl.store(statistics + 3 * m, logit_sum)
    if METRICS:
        statistics += (3 + LOGIT_SUM) * m
        tl.store(statistics, weighted)
        tl.store(statistics + m, best.to(total.dtype))


@triton.jit
def merge(
    stacked, shifts, targets, rows, gradients, losses, lses, scales, target_factors, m, p,
    K: tl.constexpr, Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr, SMOOTHING_PER_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Computes `Objective.merge` and `Objective.factors`, without metrics, of some tokens."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = tokens < m
    largest = tl.full([TOKENS], FLOOR, dtype=stacked.dtype.element_ty)
    for rank in range(p):
        largest = tl.maximum(largest, tl.load(stacked + rank * K * m + tokens, mask=mask, other=0))
    total = tl.zeros([TOKENS], dtype=largest.dtype)
    target, logit_sum = total, total
    for rank in range(p):
        part = stacked + rank * K * m + tokens
        shift = tl.load(part, mask=mask, other=0)
        total += tl.load(part + m, mask=mask, other=1) * tl.exp(shift - largest)
        target += tl.load(part + 2 * m, mask=mask, other=0)
        if SMOOTHING > 0:
            logit_sum += tl.load(part + 3 * m, mask=mask, other=0)
    lse = largest + tl.log(total)
    tl.store(lses + tokens, lse, mask=mask)
    loss = lse - (1 - SMOOTHING) * target + Z_LOSS * lse * lse - SMOOTHING_PER_ROW * logit_sum
    tl.store(losses + tokens, loss, mask=mask)

    gradient = tl.load(gradients + tokens, mask=mask, other=0)
    gain = 1 + 2 * Z_LOSS * lse
    shift = tl.load(shifts + tokens, mask=mask, other=0)
    tl.store(scales + tokens, gradient * gain * tl.exp(shift - lse), mask=mask)
    own, slope = tl.load(targets + tokens, mask=mask, other=0), 1.0
    if SOFTCAP is not None:
        own, slope = _cap(own, SOFTCAP)
    factor = gradient * slope * (gain * tl.exp(own - lse) - (1 - SMOOTHING))
    owned = tl.load(rows + tokens, mask=mask, other=-1) >= 0
    tl.store(target_factors + tokens, tl.where(owned, factor, 0), mask=mask)


@triton.jit
def dlogits(
    logits, logits_stride, factors, factors_stride, rows, lse, z_loss_gain, v, wide,
    SHARE: tl.constexpr, SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes one token's (gain · exp(z - lse) - share) · dz/du, and 0 for the target."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * logits_stride
    factors += token * factors_stride
    row, shift, z_loss_gain = tl.load(rows + token), tl.load(lse + token), tl.load(z_loss_gain + token)
    lanes = tl.arange(0, COLUMNS)
    for start in range(0, v, COLUMNS):
        columns = start + lanes
        z, slope = _logits(logits, -1, shift, columns, v, wide, SOFTCAP)
        factor = z_loss_gain * tl.exp(z - shift) - SHARE
        if SOFTCAP is not None:
            factor *= slope
        factor = tl.where(columns == row, 0, factor)
        tl.store(factors + columns, factor.to(factors.dtype.element_ty), mask=columns < wide)


@triton.jit
def target_logits(hidden, hidden_stride, weight, weight_stride, rows, out, D, COLUMNS: tl.constexpr):
    """Computes one token's hidden · weight[row], 0 if another shard owns the row."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token)
    lanes = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=out.dtype.element_ty)
    owned = tl.where(row >= 0, D, 0)
    for start in range(0, owned, COLUMNS):
        columns = start + lanes
        x = tl.load(hidden + token * hidden_stride + columns, mask=columns < owned, other=0)
        w = tl.load(weight + row * weight_stride + columns, mask=columns < owned, other=0)
        total += x.to(total.dtype) * w.to(total.dtype)
    tl.store(out + token, tl.sum(total, 0))


@triton.jit
def scale(
    product, scale, target_factor, hidden, hidden_stride, weight, weight_stride, rows, scaled, D,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scales one token: product = scale · product + target_factor · weight[row]; scaled = scale · hidden."""
    token = tl.program_id(0).to(tl.int64)
    row, factor, target = tl.load(rows + token), tl.load(scale + token), tl.load(target_factor + token)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < D
    sums = tl.load(product + token * D + columns, mask=mask, other=0) * factor
    w = tl.load(weight + row * weight_stride + columns, mask=columns < tl.where(row >= 0, D, 0), other=0)
    x = tl.load(hidden + token * hidden_stride + columns, mask=mask, other=0)
    tl.store(product + token * D + columns, sums + target * w.to(sums.dtype), mask=mask)
    tl.store(scaled + token * D + columns, (x.to(sums.dtype) * factor).to(scaled.dtype.element_ty), mask=mask)


@triton.jit
def add_rows(gradient, sorted_rows, order, target_factor, hidden, hidden_stride, m, D, COLUMNS: tl.constexpr):
    """Adds target_factor · hidden to rows. The first token of a run of equal rows adds the whole run, in order."""
    position = tl.program_id(0)
    row = tl.load(sorted_rows + position)
    before = tl.load(sorted_rows + position - 1, mask=position > 0, other=-1)
    if row != before:  # also skips targets of other shards: row -1 comes first
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        mask = columns < D
        place = gradient + row * D + columns
        total = tl.load(place, mask=mask)
        current = row
        while current == row:
            places = position + tl.arange(0, TURN)
            same = tl.load(sorted_rows + places, mask=places < m, other=-1) == row
            tokens = tl.load(order + places, mask=same, other=0)
            factors = tl.load(target_factor + tokens, mask=same, other=0)
            x = tl.load(
                hidden + tokens[:, None] * hidden_stride + columns[None, :],
                mask=same[:, None] & mask[None, :], other=0,
            )  # fmt: skip
            total += tl.sum(factors[:, None] * x.to(total.dtype), 0)
            position += TURN
            current = tl.load(sorted_rows + position, mask=position < m, other=-1)
        tl.store(place, total, mask=mask)
