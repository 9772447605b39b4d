"""Figures and settings as readers see them, in the report and on the model cards."""

DIVERGENCE = {  # figure of build/evaluate -> head of a column
    "kl": "KL",
    "kl_99": "KL, 99%",
    "reverse_kl": "reverse KL",
    "reverse_kl_99": "reverse KL, 99%",
    "agreement": "same token",
}
DIVERGES = (
    "KL is KL(dense ‖ pruned) in nats per predicted token: the mean, and the value that 99% of the tokens do"
    " not exceed. Same token is the share of positions where both models find the same token most likely."
)


def sparsity(share: float) -> str:
    return f"{100 * share:.2f}%"


def perplexity(value: float) -> str:
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def share(part: float) -> str:
    return f"{round(100 * part, 1) + 0.0:.1f}%"


def points(part: float) -> str:
    """A share in percent, under a head that says so."""
    return f"{100 * part:.1f}"


def kl(nats: float) -> str:
    return f"{nats:.4f}" if nats < 1000 else f"{nats:.2e}"


def size(count: int) -> str:
    value, unit = next(
        (count / scale, unit)
        for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
        if count >= scale or scale == 1
    )
    return f"{value:.2f} {unit}"
