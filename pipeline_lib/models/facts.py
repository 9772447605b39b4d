"""Guesses about facts that a run without weights does not show by itself: the layout of Q, K and V in
a fused projection, and the channels that rotate together.

A run confirms each guess before it is used. If no guess fits a family, add one here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Usual names of modules: they give a matrix its kind, for plots and tables, if the run does not.
_KINDS = {
    "q": ("q_proj", "query", "q_lin", "wq"),
    "k": ("k_proj", "key", "k_lin", "wk"),
    "v": ("v_proj", "value", "v_lin", "wv"),
    "o": ("o_proj", "out_proj", "out_lin", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3"),
    "down": ("down_proj", "w2"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack"),
    "gate_up": ("gate_up_proj",),
}
KINDS = {name: kind for kind, names in _KINDS.items() for name in names}


def kind_of(parameter: str) -> str:
    """The kind of a matrix, from the name of its parameter; for an unknown module, the module's name."""
    module = parameter.removesuffix(".weight").rpartition(".")[2]
    return KINDS.get(module, module.removesuffix("_proj"))


@dataclass(frozen=True)
class Heads:
    """Numbers of query heads (``q``) and of key/value heads (``kv``). ``sizes`` are possible numbers of
    channels per head, ``rotary`` possible numbers of rotating channels.
    """

    q: int
    kv: int
    sizes: tuple[int, ...]
    rotary: tuple[int, ...] = ()
    # channels of a head's keys and values that come from one latent (DeepSeek)
    latent: tuple[int, int] | None = None


def named(config: Any, name: str) -> Any:
    """The value of a config's key, or None. It is also None if blocks have different values, for which
    transformers raises an error.
    """
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def heads_of(config: Any) -> Heads | None:
    """The heads that a config describes, or None."""

    def number(*names: str) -> int | None:
        return next(
            (found for name in names if isinstance(found := named(config, name), int) and found > 0), None
        )

    q = number("num_attention_heads", "n_head", "n_heads", "num_heads")
    width = number("hidden_size", "n_embd", "d_model")
    if q is None or width is None:
        return None
    kv = number("num_key_value_heads", "num_kv_heads") or q
    if named(config, "multi_query") and not named(config, "new_decoder_architecture"):
        kv = 1
    told = (
        named(config, name) for name in ("head_dim", "v_head_dim", "global_head_dim", "attention_head_dim")
    )
    sizes = dict.fromkeys([size for size in told if isinstance(size, int) and size > 0] + [width // q])
    rope = named(config, "rope_parameters") or {}
    nested = [each for each in rope.values() if isinstance(each, dict)] or [rope]
    shares = {1.0, *(float(each.get("partial_rotary_factor") or 1.0) for each in nested)}
    some = [int(size * share) for size in sizes for share in sorted(shares)] + [
        number("rotary_dim", "qk_rope_head_dim") or 0
    ]
    rotary = dict.fromkeys(2 * -(-count // 2) for count in sorted(some) if count)
    keys, values = number("qk_nope_head_dim"), number("v_head_dim")
    return Heads(q, kv, tuple(sizes), tuple(rotary), (keys, values) if keys and values else None)


@dataclass(frozen=True)
class Partition:
    """The matrices in a fused projection: the kind and the rows of each."""

    kinds: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]

    @property
    def contiguous(self) -> bool:
        """Whether the rows of each matrix are consecutive."""
        return all(rows == tuple(range(rows[0], rows[0] + len(rows))) for rows in self.rows)


def partitions(size: int, heads: Heads | None) -> Iterator[Partition]:
    """Possible partitions of ``size`` rows."""
    if heads is not None:
        for channels in heads.sizes:
            q, kv = heads.q * channels, heads.kv * channels
            group = heads.q // heads.kv
            if size == q + 2 * kv:
                bounds = (0, q, q + kv, q + 2 * kv)
                yield Partition(("q", "k", "v"), tuple(tuple(range(*bounds[i : i + 2])) for i in range(3)))
                yield Partition(
                    ("q", "k", "v"), _by_heads(heads.kv, ((group, channels), (1, channels), (1, channels)))
                )
            if size == heads.q * 2 * channels + 2 * kv:  # a gate beside Q
                yield Partition(
                    ("q", "k", "v"),
                    tuple(tuple(range(*b)) for b in ((0, 2 * q), (2 * q, 2 * q + kv), (2 * q + kv, size))),
                )
        if heads.latent is not None and size == heads.q * sum(heads.latent):
            yield Partition(("k", "v"), _by_heads(heads.q, tuple((1, channels) for channels in heads.latent)))
    if size % 2 == 0:
        half = size // 2
        yield Partition(("gate", "up"), (tuple(range(half)), tuple(range(half, size))))
        yield Partition(("up", "gate"), (tuple(range(half)), tuple(range(half, size))))
        yield Partition(("gate", "up"), (tuple(range(0, size, 2)), tuple(range(1, size, 2))))


def _by_heads(heads: int, parts: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    """Rows of each part, if the projection stores head after head, and in each head part after part.

    Args:
        parts: per part (count, channels); it has count · channels rows in each head.
    """
    span = sum(count * channels for count, channels in parts)
    starts = [sum(count * channels for count, channels in parts[:number]) for number in range(len(parts))]
    return tuple(
        tuple(head * span + start + i for head in range(heads) for i in range(count * channels))
        for start, (count, channels) in zip(starts, parts, strict=True)
    )


@dataclass(frozen=True)
class Rotation:
    """``size`` factors that Q and K share: for each row of K and of Q, the index of its factor. Channels
    that rotate together have the same factor.
    """

    size: int
    keys: tuple[int, ...]
    queries: tuple[int, ...]


def rotations(rows_q: int, rows_k: int, heads: Heads | None) -> Iterator[Rotation]:
    """Possible rotations for Q and K with these numbers of rows; those with more factors come first."""
    if (
        heads is None
        or rows_q % heads.q
        or rows_k % heads.kv
        or rows_q // heads.q != rows_k // heads.kv
        or heads.q % heads.kv
    ):
        return
    size, group = rows_q // heads.q, heads.q // heads.kv
    pairings: list[list[int]] = [list(range(size))]
    for rotary in heads.rotary:
        half = rotary // 2
        if 0 < rotary <= size:
            rest = range(half, half + size - rotary)
            pairings.append([*(i % half for i in range(rotary)), *rest])  # i with i + half
            pairings.append([*(i // 2 for i in range(rotary)), *rest])  # neighbours rotate together
            # the last channels rotate
            pairings.append([*range(half, half + size - rotary), *(i % half for i in range(rotary))])
    for pairing in pairings:
        free = max(pairing) + 1
        keys = tuple(head * free + pairing[i] for head in range(heads.kv) for i in range(size))
        queries = tuple((head // group) * free + pairing[i] for head in range(heads.q) for i in range(size))
        yield Rotation(heads.kv * free, keys, queries)
