"""The table: for each ``model_type``, its architecture under a config, read off the modelling code of transformers.

Adding a family is adding an entry to ``FAMILIES`` and watching ``tests/test_folding.py`` pass for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from transformers import PreTrainedConfig

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models.architecture import Architecture, Coupling, Layout, Matrix, Site, Tie

# f(c x) = c f(x) for c > 0, so that a positive factor passes through; GELU and SiLU are not of the kind.
HOMOGENEOUS = {"relu", "leaky_relu"}


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

    def interleaved(self, part: int) -> tuple[int, ...]:
        """Rows of Q (0), K (1) or V (2) in a fused projection that is laid out [heads, 3, size]."""
        return tuple((3 * head + part) * self.size + i for head in range(self.q) for i in range(self.size))


@dataclass(frozen=True)
class _Linear:
    """Outputs of a linear module: all, a contiguous ``part`` (a logical matrix of its own), or a scattered one (which is none)."""

    kind: str
    module: str
    bias: bool
    part: range | tuple[int, ...] | None = None
    conv: bool = False  # Conv1D stores its weight [C, R]

    def matrix(self, site: str) -> Matrix:
        rows = (self.part.start, self.part.stop) if isinstance(self.part, range) else None
        bias = f"{self.module}.bias" if self.bias else None
        return Matrix(self.kind, f"{self.module}.weight", site, bias, rows, self.conv)

    def outputs(self, index: tuple[int, ...], power: int) -> tuple[Tie, ...]:
        """The rows of the weight, and the bias where there is one."""
        positions = None if self.part is None else tuple(self.part)
        weight = Tie(f"{self.module}.weight", int(self.conv), index, power, positions=positions)
        return (weight, Tie(f"{self.module}.bias", 0, index, power, positions=positions)) if self.bias else (weight,)

    def inputs(self, index: tuple[int, ...]) -> Tie:
        """The columns of the weight, which undo what was done to the inputs."""
        return Tie(f"{self.module}.weight", int(not self.conv), index, -1)


def _fused(module: str, bias: bool, conv: bool = False, **sizes: int) -> tuple[_Linear, ...]:
    """The parts of a projection that holds several matrices one below the other; their kinds and rows in order."""
    bounds = pairwise(accumulate(sizes.values(), initial=0))
    return tuple(_Linear(kind, module, bias, range(*rows), conv) for kind, rows in zip(sizes, bounds, strict=True))


@dataclass(frozen=True)
class _Norm:
    """A norm whose output only linears read."""

    module: str
    bias: bool
    offset: float = 0.0

    def ties(self, index: tuple[int, ...]) -> tuple[Tie, ...]:
        weight = Tie(f"{self.module}.weight", 0, index, 1, self.offset)
        return (weight, Tie(f"{self.module}.bias", 0, index, 1)) if self.bias else (weight,)


@dataclass(frozen=True)
class _Attention:
    """Heads, and the linears around them."""

    heads: _Heads
    linears: tuple[_Linear, ...]  # q, k, v, o
    q_k: bool = True  # False: q and k are normalised per head, which takes any factor out again


@dataclass(frozen=True)
class _Mlp:
    """Two or three linears around an activation."""

    linears: tuple[_Linear, ...]  # gate, up, down or fc1, fc2
    inner: int  # channels between them
    activation: str


def _assemble(
    config: PreTrainedConfig,
    blocks: str,
    attention: _Attention,
    mlp: _Mlp,
    norms: tuple[_Norm, _Norm] | None,  # None: they also feed the residual stream, or have no weight
) -> Architecture:
    """Matrices, sites and couplings of a decoder block; every family is one call of this."""
    width, heads = config.hidden_size, attention.heads
    channels, values, units = tuple(range(width)), tuple(range(heads.kv * heads.size)), tuple(range(mlp.inner))
    q, k, v, o = attention.linears
    *into, out = mlp.linears
    gated = len(into) == 2
    up_down = "up_down" if gated else "fc1_fc2"
    couplings = []

    def norm(name: str, number: int, consumers: list[_Linear]) -> None:
        if norms is not None:
            ties = (*norms[number].ties(channels), *(linear.inputs(channels) for linear in consumers))
            couplings.append(Coupling(name, width, tuple(dict.fromkeys(ties))))  # parts of a fused parameter share their columns

    norm("attention_norm", 0, [q, k, v])
    couplings.append(Coupling("v_o", len(values), (*v.outputs(values, 1), o.inputs(heads.value_to_output()))))
    if attention.q_k:
        free, keys, queries = heads.key_factors()
        couplings.append(Coupling("q_k", free, (*k.outputs(keys, 1), *q.outputs(queries, -1))))
    norm("mlp_norm", 1, into)
    # up takes a factor whatever the gate's activation is (with ReLU the gate's rows could take one too: not offered).
    if gated or mlp.activation in HOMOGENEOUS:
        couplings.append(Coupling(up_down, mlp.inner, (*into[-1].outputs(units, 1), out.inputs(units))))
    offered = {coupling.name for coupling in couplings}

    def site(name: str, module: str, coupling: str, index: tuple[int, ...]) -> Site:
        return Site(name, module, coupling if coupling in offered else None, index)

    sites = (
        site("attention_input", q.module, "attention_norm", channels),
        site("attention_output", o.module, "v_o", heads.value_to_output()),
        site("mlp_input", into[0].module, "mlp_norm", channels),
        site("mlp_inner", out.module, up_down, units),
    )
    consumers = ([q, k, v], [o], into, [out])
    matrices = dict.fromkeys(linear.matrix(site.name) for site, linears in zip(sites, consumers, strict=True) for linear in linears)
    layout = Layout(tuple(matrices), sites, tuple(couplings))
    return Architecture(config.model_type, blocks, width, (layout,) * config.num_hidden_layers)


def _even(rotary: float) -> int:
    """Channels that rotate: they come in pairs."""
    return 2 * -(-int(rotary) // 2)


def _grouped(config: PreTrainedConfig, rotary: float = 1.0) -> _Heads:
    """Heads of the Llama-like families; ``rotary`` is the share of a head's channels that rotate."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _Heads(config.num_attention_heads, config.num_key_value_heads, size, _even(size * rotary))


def _plain(config: PreTrainedConfig, rotary: float = 0.0) -> _Heads:
    """As many key/value heads as query heads."""
    size = config.hidden_size // config.num_attention_heads
    return _Heads(config.num_attention_heads, config.num_attention_heads, size, _even(size * rotary))


def _llama(
    config: PreTrainedConfig,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    head_norms: bool = False,
    norm_offset: float = 0.0,
) -> Architecture:
    """Llama, Mistral, Qwen2, Qwen3, Gemma, Granite: one block, with or without biases, per-head norms and 1 + w."""
    attention = (*(_Linear(kind, f"self_attn.{kind}_proj", qkv_bias) for kind in "qkv"), _Linear("o", "self_attn.o_proj", o_bias))
    mlp = tuple(_Linear(kind, f"mlp.{kind}_proj", mlp_bias) for kind in ("gate", "up", "down"))
    return _assemble(
        config,
        "layers",
        _Attention(_grouped(config), attention, q_k=not head_norms),
        _Mlp(mlp, config.intermediate_size, config.hidden_act),
        (_Norm("input_layernorm", False, norm_offset), _Norm("post_attention_layernorm", False, norm_offset)),
    )


def _phi3(config: PreTrainedConfig) -> Architecture:
    """Llama's block with q, k, v and gate, up fused, each part a matrix of its own."""
    heads, inner = _grouped(config, config.rope_parameters.get("partial_rotary_factor", 1.0)), config.intermediate_size
    keys = heads.kv * heads.size
    attention = (*_fused("self_attn.qkv_proj", False, q=heads.q * heads.size, k=keys, v=keys), _Linear("o", "self_attn.o_proj", False))
    mlp = (*_fused("mlp.gate_up_proj", False, gate=inner, up=inner), _Linear("down", "mlp.down_proj", False))
    norms = (_Norm("input_layernorm", False), _Norm("post_attention_layernorm", False))
    return _assemble(config, "layers", _Attention(heads, attention), _Mlp(mlp, inner, config.hidden_act), norms)


def _opt(config: PreTrainedConfig) -> Architecture:
    """Post-norm (OPT-350M): each norm also feeds the residual stream. ``final_layer_norm`` inside a layer is the norm before the MLP."""
    bias = config.enable_bias
    absorbs = config.do_layer_norm_before and config.layer_norm_elementwise_affine
    attention = (*(_Linear(kind, f"self_attn.{kind}_proj", bias) for kind in "qkv"), _Linear("o", "self_attn.out_proj", bias))
    return _assemble(
        config,
        "decoder.layers",
        _Attention(_plain(config), attention),
        _Mlp((_Linear("fc1", "fc1", bias), _Linear("fc2", "fc2", bias)), config.ffn_dim, config.activation_function),
        (_Norm("self_attn_layer_norm", True), _Norm("final_layer_norm", True)) if absorbs else None,
    )


def _starcoder2(config: PreTrainedConfig) -> Architecture:
    """Llama's attention between LayerNorms, and an MLP without a gate; one switch for the biases of all linears."""
    bias = config.use_bias
    attention = (*(_Linear(kind, f"self_attn.{kind}_proj", bias) for kind in "qkv"), _Linear("o", "self_attn.o_proj", bias))
    return _assemble(
        config,
        "layers",
        _Attention(_grouped(config), attention),
        _Mlp((_Linear("fc1", "mlp.c_fc", bias), _Linear("fc2", "mlp.c_proj", bias)), config.intermediate_size, config.hidden_act),
        (_Norm("input_layernorm", True), _Norm("post_attention_layernorm", True)),
    )


def _interleaved(module: str, bias: bool, heads: _Heads) -> _Attention:
    """GPT-NeoX's and BLOOM's: query_key_value is [heads, 3, size] and one logical matrix, since its parts are not contiguous."""
    qkv = tuple(_Linear("qkv", f"{module}.query_key_value", bias, heads.interleaved(part)) for part in range(3))
    return _Attention(heads, (*qkv, _Linear("o", f"{module}.dense", bias)))


_DENSE = (_Linear("fc1", "mlp.dense_h_to_4h", True), _Linear("fc2", "mlp.dense_4h_to_h", True))  # the MLP of both
_NORMS = (_Norm("input_layernorm", True), _Norm("post_attention_layernorm", True))


def _gpt_neox(config: PreTrainedConfig) -> Architecture:
    """Residuals in parallel or in series: either way each norm feeds linears only."""
    heads = _plain(config, config.rope_parameters.get("partial_rotary_factor", 1.0))
    attention = _interleaved("attention", config.attention_bias, heads)
    entry = _assemble(config, "layers", attention, _Mlp(_DENSE, config.intermediate_size, config.hidden_act), _NORMS)
    return replace(entry, stored_head="embed_out.weight")


def _bloom(config: PreTrainedConfig) -> Architecture:
    """ALiBi is added to the logits and leaves every Q/K channel free. The activation is always GELU."""
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise SparselineError(
            "BLOOM with slow_but_exact goes round its own output projections; set slow_but_exact to false in config.json."
        )
    absorbs = not config.apply_residual_connection_post_layernorm  # where true, the norms also feed the residual stream
    attention = _interleaved("self_attention", True, _plain(config))
    return _assemble(config, "h", attention, _Mlp(_DENSE, 4 * config.hidden_size, "gelu"), _NORMS if absorbs else None)


def _gpt2(config: PreTrainedConfig) -> Architecture:
    """Conv1D stores [inputs, outputs]; q, k, v are thirds of c_attn's outputs."""
    if config.add_cross_attention:
        raise SparselineError("GPT-2 with cross-attention is not supported; give a decoder-only checkpoint.")
    width = config.hidden_size
    inner = 4 * width if config.n_inner is None else config.n_inner
    attention = (*_fused("attn.c_attn", True, conv=True, q=width, k=width, v=width), _Linear("o", "attn.c_proj", True, conv=True))
    mlp = (_Linear("fc1", "mlp.c_fc", True, conv=True), _Linear("fc2", "mlp.c_proj", True, conv=True))
    return _assemble(
        config,
        "h",
        _Attention(_plain(config), attention),
        _Mlp(mlp, inner, config.activation_function),
        (_Norm("ln_1", True), _Norm("ln_2", True)),
    )


FAMILIES: dict[str, Callable[[PreTrainedConfig], Architecture]] = {
    "llama": lambda c: _llama(c, qkv_bias=c.attention_bias, o_bias=c.attention_bias, mlp_bias=c.mlp_bias),
    "mistral": _llama,
    "qwen2": lambda c: _llama(c, qkv_bias=True),
    "qwen3": lambda c: _llama(c, qkv_bias=c.attention_bias, o_bias=c.attention_bias, head_norms=True),
    "gemma": lambda c: _llama(c, qkv_bias=c.attention_bias, o_bias=c.attention_bias, norm_offset=1.0),
    "granite": lambda c: _llama(c, qkv_bias=c.attention_bias, o_bias=c.attention_bias, mlp_bias=c.mlp_bias),
    "phi3": _phi3,
    "starcoder2": _starcoder2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "bloom": _bloom,
}


def architecture(config: PreTrainedConfig) -> Architecture:
    """The table's entry for this config.

    Raises:
        SparselineError: a family that is not in the table, or a checkpoint that is already quantised.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise SparselineError(
            "The model is already quantised; give the original checkpoint, since pruning needs its full-precision weights."
        )
    entry = FAMILIES.get(config.model_type)
    if entry is None:
        raise SparselineError(
            f"Models of type {config.model_type!r} are not supported (no mixture-of-experts, multimodal or remote-code models); "
            f"supported: {', '.join(sorted(FAMILIES))}."
        )
    return entry(config)
