"""The cellular automaton Life on a torus of SIZE x SIZE cells. cellular.c gives the same checksums.

A cell is born with 3 neighbors and lives on with 2 or 3. A row is one whole number with a bit for each cell,
the leftmost lowest, so that a row's neighbors are counted all at once with the logic of a binary adder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import workload

Grid = list[int]


def _soup(size: int, seed: int) -> Grid:
    return [
        sum((workload.draw(seed, row * size + column) >> 63) << column for column in range(size))
        for row in range(size)
    ]


def _population(grid: Grid) -> int:
    return sum(row.bit_count() for row in grid)


def _advance(grid: Grid, size: int) -> tuple[Grid, int]:
    """Return the next generation, and how many living neighbors all cells together have."""
    mask = (1 << size) - 1
    # For each row, what its cells add to the row above and below (three cells) and to itself (two), as the
    # two bits of a sum.
    threes, twos = [], []
    for row in grid:
        left, right = (row << 1) & mask | row >> (size - 1), row >> 1 | (row & 1) << (size - 1)
        either = left ^ right
        threes.append((either ^ row, left & right | either & row))
        twos.append((either, left & right))
    new, neighbors = [], 0
    for i, row in enumerate(grid):
        (up0, up1), (down0, down1), (here0, here1) = threes[i - 1], threes[(i + 1) % size], twos[i]
        bit0 = up0 ^ down0 ^ here0
        carry0 = up0 & down0 | (up0 ^ down0) & here0
        half = up1 ^ down1 ^ here1
        carry1 = up1 & down1 | (up1 ^ down1) & here1
        bit1, carry2 = half ^ carry0, half & carry0
        bit2, bit3 = carry1 ^ carry2, carry1 & carry2
        neighbors += bit0.bit_count() + 2 * bit1.bit_count() + 4 * bit2.bit_count() + 8 * bit3.bit_count()
        new.append(bit1 & (bit0 | row) & ~(bit2 | bit3))
    return new, neighbors


def _words(grid: Grid, size: int) -> Iterator[int]:
    """Yield the grid row by row, 64 cells a word; a row begins with a new word."""
    low = (1 << 64) - 1
    for row in grid:
        for shift in range(0, size, 64):
            yield row >> shift & low


def _prepare(size: int) -> Callable[[workload.Step], int]:
    grid = _soup(size, workload.seed(workload.start(size), 0, 0))
    alive = _population(grid)

    def generation(step: workload.Step) -> int:
        nonlocal grid, alive
        new, neighbors = _advance(grid, size)
        # Every living cell is a neighbor of eight: this holds on any torus, whatever the pattern, and also
        # finds cells that changed since they were counted.
        if neighbors != 8 * alive:
            raise workload.CheckFailedError(f"{alive} cells were seen {neighbors} times, not 8 times each")
        births = sum((then & ~now).bit_count() for now, then in zip(grid, new, strict=True))
        deaths = sum((now & ~then).bit_count() for now, then in zip(grid, new, strict=True))
        if step.spoil:
            new[size // 2] ^= 1 << size // 2
        expected, alive = alive + births - deaths, _population(new)
        if alive != expected:
            raise workload.CheckFailedError(f"{alive} cells live, births and deaths leave {expected}")
        grid = new
        return workload.fold(step.checksum, _words(grid, size))

    return generation


if __name__ == "__main__":
    workload.run(
        workload.Workload(
            name="cellular.py",
            size_name="SIZE",
            step_name="generation",
            steps_name="GENERATIONS",
            size=512,
            sizes=range(3, 16385),  # on a smaller torus a cell would be its own neighbor
            steps=1000,
        ),
        _prepare,
    )
