"""Figures and settings as readers see them, in the report and on the model cards."""


def sparsity(share: float) -> str:
    return f"{100 * share:.2f}%"


def perplexity(value: float) -> str:
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def gap(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f}%"


def size(count: int) -> str:
    value, unit = next(
        (count / scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if count >= scale or scale == 1
    )
    return f"{value:.2f} {unit}"
