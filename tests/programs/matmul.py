"""Matrix multiplication, again and again. matmul.c gives the same checksums.

The matrices hold whole numbers from -1024 to 1023 as doubles. Up to order 2048 every sum stays below 2^53, so
all arithmetic is exact: the check needs no tolerance, and no order of summing changes the result.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from operator import mul

import workload

Matrix = list["array[float]"]


def _matrix(order: int, seed: int) -> Matrix:
    return [
        array("d", [(workload.draw(seed, i * order + j) >> 53) - 1024.0 for j in range(order)])
        for i in range(order)
    ]


def _dot(x: array[float], y: array[float]) -> float:
    return sum(map(mul, x, y), 0.0)


def _check(a: Matrix, b: Matrix, c: Matrix, seed: int) -> None:
    """Freivalds' check: C x must be A (B x). No element of x is 0: one wrong element of C is always found."""
    x = array("d", [float(workload.draw(seed, i) >> 53 | 1) for i in range(len(a))])
    bx = array("d", [_dot(row, x) for row in b])
    for i, (a_row, c_row) in enumerate(zip(a, c, strict=True)):
        if _dot(a_row, bx) != _dot(c_row, x):
            raise workload.CheckFailedError(f"row {i} of the product is wrong")


def _prepare(order: int) -> Callable[[workload.Step], int]:
    def repeat(step: workload.Step) -> int:
        a = _matrix(order, workload.seed(step.checksum, step.number, 0))
        b = _matrix(order, workload.seed(step.checksum, step.number, 1))
        columns = [array("d", column) for column in zip(*b, strict=True)]
        c = [array("d", [_dot(row, column) for column in columns]) for row in a]
        if step.spoil:
            c[order // 2][0] += 1.0
        _check(a, b, c, workload.seed(step.checksum, step.number, 2))
        checksum = step.checksum
        for row in c:
            checksum = workload.fold_doubles(checksum, row)
        return checksum

    return repeat


if __name__ == "__main__":
    workload.run(
        workload.Workload(
            name="matmul.py",
            size_name="ORDER",
            step_name="repeat",
            steps_name="REPEATS",
            size=128,
            sizes=range(1, 2049),
            steps=50,
        ),
        _prepare,
    )
