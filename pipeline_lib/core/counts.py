"""Numbers of kept weights as integers: overall, and in proportion to sizes."""

from collections.abc import Sequence


def target(sparsity: float, total: int) -> int:
    """Weights kept overall: round((1 − p)·N)."""
    return round((1 - sparsity) * total)


def shares(kept: int, sizes: Sequence[int]) -> list[int]:
    """Split ``kept`` over parts in proportion to their sizes, by largest remainder (ties to the
    earlier part); exact.
    """
    total = sum(sizes)
    exact = [kept * size / total for size in sizes]
    floor = [kept * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (floor[i] - exact[i], i))
    for i in order[: kept - sum(floor)]:
        floor[i] += 1
    return floor


def check(kept: int, budget: int, quantum: int) -> None:
    """Check that a number of kept weights equals the budget. With N:M it may differ by half of the
    largest step.

    Raises:
        RuntimeError: it is not.
    """
    if abs(kept - budget) > (quantum / 2 if quantum > 1 else 0):
        raise RuntimeError(f"{kept} weights kept instead of {budget}")
