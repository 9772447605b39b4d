"""Architectures as data: for each ``model_type``, where blocks, matrices and sites are, and which tensors absorb a factor.

Adding an architecture is adding an entry to ``FAMILIES`` and watching ``tests/test_folding.py`` pass for it.

Shape letters: ``R`` outputs (rows), ``C`` inputs (columns) of a logical matrix, ``d`` channels of a site.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from pipeline_lib.errors import SparselineError


@dataclass(frozen=True)
class Matrix:
    """A logical matrix [R, C] inside a block: the unit of scores, allocation, masks and sensitivities.

    ``rows``, ``transposed`` and ``expert`` say which part of ``parameter`` it is (fused projections, Conv1D, 3-D experts).
    """

    kind: str  # q, k, v, o, gate, up, down, fc1, fc2: the role, for plots and tables
    parameter: str  # relative to the block
    site: str  # whose inputs it multiplies
    bias: str | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    expert: int | None = None

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The logical [R, C] matrix as a view of the stored parameter (or of anything shaped like it)."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.T
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    @property
    def label(self) -> str:
        """Unique name inside the block."""
        part = "" if self.rows is None else f"[{self.rows[0]}:{self.rows[1]}]"
        return self.parameter.removesuffix(".weight") + part + ("" if self.expert is None else f".{self.expert}")


@dataclass(frozen=True)
class Tie:
    """One tensor that a coupling multiplies: entry ``i`` along ``axis`` takes ``factor[index[i]] ** power``."""

    parameter: str
    axis: int
    index: tuple[int, ...]
    power: int
    offset: float = 0.0  # Gemma keeps its norm weight as 1 + w


@dataclass(frozen=True)
class Coupling:
    """``size`` free positive factors whose ties cancel: the block's function does not depend on them (2602.21652, Eq. 3)."""

    name: str
    size: int
    ties: tuple[Tie, ...]


@dataclass(frozen=True)
class Site:
    """A place whose activations X [tokens, d] are the input of one or more matrices.

    ``module`` is a module that receives X; ``coupling`` scales X by ``factor[index]`` (X' = D X).
    """

    name: str
    module: str
    coupling: str | None
    index: tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """What the pipeline needs to know of one family under one config. Names are relative to the base model and to a block."""

    family: str
    blocks: str  # path of the module list inside the base model
    depth: int
    width: int  # channels of the residual stream
    matrices: tuple[Matrix, ...]
    sites: tuple[Site, ...]
    couplings: tuple[Coupling, ...]

    def site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def consumers(self, site: str) -> tuple[Matrix, ...]:
        return tuple(matrix for matrix in self.matrices if matrix.site == site)

    def matrix_name(self, block: int, matrix: Matrix) -> str:
        """The logical matrix's name in allocations, sensitivities and patterns."""
        return f"{self.blocks}.{block}.{matrix.label}"


@dataclass(frozen=True)
class _Heads:
    """``q`` query heads on ``kv`` key/value heads of ``size`` channels; the first ``rotary`` of them rotate, i with i + rotary/2."""

    q: int
    kv: int
    size: int
    rotary: int

    def value_to_output(self) -> tuple[int, ...]:
        """For each input channel of o: the row of v that it carries."""
        group = self.q // self.kv
        return tuple((head // group) * self.size + i for head in range(self.q) for i in range(self.size))

    def key_factors(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Free Q/K factors, and their index per row of K and per row of Q. Rotated pairs and grouped queries share theirs."""
        half = self.rotary // 2
        free = self.size - half

        def channel(i: int) -> int:
            return i % half if i < self.rotary else i - half

        keys = tuple(head * free + channel(i) for head in range(self.kv) for i in range(self.size))
        group = self.q // self.kv
        queries = tuple((head // group) * free + channel(i) for head in range(self.q) for i in range(self.size))
        return self.kv * free, keys, queries


def _with_bias(weight: str, bias: bool, index: tuple[int, ...], power: int) -> tuple[Tie, ...]:
    """Output rows of a linear: its weight's rows, and its bias where there is one."""
    rows = Tie(weight, 0, index, power)
    return (rows, Tie(weight.removesuffix("weight") + "bias", 0, index, power)) if bias else (rows,)


def _attention(heads: _Heads, bias: bool, o: str) -> tuple[Coupling, Coupling]:
    """v rows with o columns, and Q rows with K rows, for separate projections under ``self_attn``."""
    values = tuple(range(heads.kv * heads.size))
    v_o = Coupling(
        "v_o", len(values), (*_with_bias("self_attn.v_proj.weight", bias, values, 1), Tie(f"{o}.weight", 1, heads.value_to_output(), -1))
    )
    free, keys, queries = heads.key_factors()
    q_k = Coupling(
        "q_k",
        free,
        (*_with_bias("self_attn.k_proj.weight", bias, keys, 1), *_with_bias("self_attn.q_proj.weight", bias, queries, -1)),
    )
    return v_o, q_k


def _llama(config: PreTrainedConfig) -> Architecture:
    width, inner = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    heads = _Heads(config.num_attention_heads, config.num_key_value_heads, size, size)
    channels, units = tuple(range(width)), tuple(range(inner))
    attention, mlp = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")

    def linear(name: str, site: str, bias: bool) -> Matrix:
        kind = name.rpartition(".")[2].removesuffix("_proj")
        return Matrix(kind, f"{name}.weight", site, f"{name}.bias" if bias else None)

    def norm(name: str, weight: str, consumers: tuple[str, ...]) -> Coupling:
        return Coupling(name, width, (Tie(weight, 0, channels, 1), *(Tie(f"{c}.weight", 1, channels, -1) for c in consumers)))

    v_o, q_k = _attention(heads, config.attention_bias, "self_attn.o_proj")
    up_down = Coupling(
        "up_down", inner, (*_with_bias("mlp.up_proj.weight", config.mlp_bias, units, 1), Tie("mlp.down_proj.weight", 1, units, -1))
    )
    return Architecture(
        family="llama",
        blocks="layers",
        depth=config.num_hidden_layers,
        width=width,
        matrices=(
            *(linear(name, "attention_input", config.attention_bias) for name in attention),
            linear("self_attn.o_proj", "attention_output", config.attention_bias),
            *(linear(name, "mlp_input", config.mlp_bias) for name in mlp),
            linear("mlp.down_proj", "mlp_inner", config.mlp_bias),
        ),
        sites=(
            Site("attention_input", "self_attn.q_proj", "attention_norm", channels),
            Site("attention_output", "self_attn.o_proj", "v_o", heads.value_to_output()),
            Site("mlp_input", "mlp.gate_proj", "mlp_norm", channels),
            Site("mlp_inner", "mlp.down_proj", "up_down", units),
        ),
        couplings=(
            norm("attention_norm", "input_layernorm.weight", attention),
            v_o,
            q_k,
            norm("mlp_norm", "post_attention_layernorm.weight", mlp),
            up_down,
        ),
    )


def _opt(config: PreTrainedConfig) -> Architecture:
    width, inner, bias = config.hidden_size, config.ffn_dim, config.enable_bias
    heads = _Heads(config.num_attention_heads, config.num_attention_heads, width // config.num_attention_heads, 0)
    channels, units = tuple(range(width)), tuple(range(inner))
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    # Post-norm (OPT-350M): each norm also feeds the residual stream, so none can absorb a factor.
    norms = config.do_layer_norm_before and config.layer_norm_elementwise_affine
    # Positively homogeneous activations carry a positive factor through; others (GELU) do not.
    homogeneous = config.activation_function == "relu"

    def linear(name: str, site: str) -> Matrix:
        kind = name.rpartition(".")[2].removesuffix("_proj").replace("out", "o")
        return Matrix(kind, f"{name}.weight", site, f"{name}.bias" if bias else None)

    def norm(name: str, module: str, consumers: tuple[str, ...]) -> Coupling:
        weights = (Tie(f"{module}.weight", 0, channels, 1), Tie(f"{module}.bias", 0, channels, 1))
        return Coupling(name, width, (*weights, *(Tie(f"{c}.weight", 1, channels, -1) for c in consumers)))

    v_o, q_k = _attention(heads, bias, "self_attn.out_proj")
    couplings = [v_o, q_k]
    if norms:
        # `final_layer_norm` inside a layer is the norm before the MLP.
        couplings += [norm("attention_norm", "self_attn_layer_norm", attention), norm("mlp_norm", "final_layer_norm", ("fc1",))]
    if homogeneous:
        couplings.append(Coupling("fc1_fc2", inner, (*_with_bias("fc1.weight", bias, units, 1), Tie("fc2.weight", 1, units, -1))))
    return Architecture(
        family="opt",
        blocks="decoder.layers",
        depth=config.num_hidden_layers,
        width=width,
        matrices=(
            *(linear(name, "attention_input") for name in attention),
            linear("self_attn.out_proj", "attention_output"),
            linear("fc1", "mlp_input"),
            linear("fc2", "mlp_inner"),
        ),
        sites=(
            Site("attention_input", "self_attn.q_proj", "attention_norm" if norms else None, channels),
            Site("attention_output", "self_attn.out_proj", "v_o", heads.value_to_output()),
            Site("mlp_input", "fc1", "mlp_norm" if norms else None, channels),
            Site("mlp_inner", "fc2", "fc1_fc2" if homogeneous else None, units),
        ),
        couplings=tuple(couplings),
    )


FAMILIES: dict[str, Callable[[PreTrainedConfig], Architecture]] = {"llama": _llama, "opt": _opt}


def architecture(config: PreTrainedConfig) -> Architecture:
    """The table's entry for this config.

    Raises:
        SparselineError: a family that is not in the table, or a checkpoint that is already quantised.
    """
    supported = ", ".join(sorted(FAMILIES))
    if getattr(config, "quantization_config", None):
        raise SparselineError(
            "The model is already quantised; give the original checkpoint, since pruning needs its full-precision weights."
        )
    entry = FAMILIES.get(config.model_type)
    if entry is None:
        raise SparselineError(
            f"Models of type {config.model_type!r} are not supported (no mixture-of-experts, multimodal or remote-code models); "
            f"supported: {supported}."
        )
    return entry(config)
