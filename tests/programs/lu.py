"""LU factorization with partial pivoting, again and again. lu.c gives the same checksums."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable

import workload

# LAPACK's own test of its LU (xGET01, in the 1-norm) passes residuals below this.
_MAX_RESIDUAL = 30.0

Matrix = list["array[float]"]


def _row(i: int, order: int, seed: int) -> array[float]:
    """Return row i of the matrix that *seed* stands for: *order* numbers from -1 to 1."""
    first = i * order
    return array("d", [(workload.draw(seed, first + j) >> 11) * 2.0**-52 - 1.0 for j in range(order)])


def _factorize(a: Matrix) -> list[int]:
    """Turn *a* into L (below the diagonal, its ones left out) and U.

    Returns:
        from which of a's rows each came.
    """
    order = len(a)
    row_of = list(range(order))
    for k in range(order):
        pivot = max(range(k, order), key=lambda i: abs(a[i][k]))
        a[k], a[pivot] = a[pivot], a[k]
        row_of[k], row_of[pivot] = row_of[pivot], row_of[k]
        divisor = a[k][k]
        if divisor == 0.0:
            raise workload.CheckFailedError(f"column {k} has no pivot")
        top = a[k][k + 1 :]
        for row in a[k + 1 :]:
            row[k] = factor = row[k] / divisor
            row[k + 1 :] = array("d", [x - factor * y for x, y in zip(row[k + 1 :], top, strict=True)])
    return row_of


def _residual(lu: Matrix, row_of: list[int], seed: int) -> float:
    """Return ||PA - LU|| / (order * epsilon * ||A||) in the infinity norm; A is made again from its seed."""
    order = len(lu)
    worst = norm = 0.0
    for i, row in enumerate(lu):
        product = [0.0] * i + list(row[i:])
        for k in range(i):
            factor = row[k]
            product[k:] = [x + factor * y for x, y in zip(product[k:], lu[k][k:], strict=True)]
        original = _row(row_of[i], order, seed)
        difference = sum(abs(x - y) for x, y in zip(original, product, strict=True))
        # Written so that a NaN is kept.
        worst = worst if difference <= worst else difference
        norm = max(norm, sum(map(abs, original)))
    return worst / (order * sys.float_info.epsilon * norm)


def _prepare(order: int) -> Callable[[workload.Step], int]:
    def sweep(step: workload.Step) -> int:
        seed = workload.seed(step.checksum, step.number, 0)
        a = [_row(i, order, seed) for i in range(order)]
        row_of = _factorize(a)
        if step.spoil:
            a[order // 2][0] += 1e-3
        ratio = _residual(a, row_of, seed)
        if not ratio <= _MAX_RESIDUAL:
            raise workload.CheckFailedError(f"residual {ratio:.3g} is above {_MAX_RESIDUAL:g}")
        checksum = workload.fold(step.checksum, row_of)
        for row in a:
            checksum = workload.fold_doubles(checksum, row)
        return checksum

    return sweep


if __name__ == "__main__":
    workload.run(
        workload.Workload(
            name="lu.py",
            size_name="ORDER",
            step_name="sweep",
            steps_name="SWEEPS",
            size=128,
            sizes=range(1, 4097),
            steps=100,
        ),
        _prepare,
    )
