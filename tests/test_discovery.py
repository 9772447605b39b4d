"""What is discovered of a model: against the table of version 1, under other names, and with
experts; couplings are tried before use.
"""

import hashlib
import inspect
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import attempt, make_checkpoint, perplexity, tiny_config
from project import (
    WANDA,
    build,
    change_params,
    environment,
    load_artifact,
    make_workspace,
    moved,
    recipe,
    shipped_params,
)
from safetensors.torch import load_file, save_file
from tiny import (
    ALL_FAMILIES,
    VOCABULARY,
    all_tensors,
    discovered,
    make_config,
    make_model,
    make_tokenizer,
    power_of_two_factors,
    randomise,
    token_rows,
)
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel
from transformers.models.llama import modeling_llama

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export.load import unpack
from pipeline_lib.models.architecture import Architecture, Layout
from pipeline_lib.models.checkpoint import open_checkpoint, skeleton
from pipeline_lib.models.conversion import assembled
from pipeline_lib.models.discover import discover
from pipeline_lib.models.folding import fold
from pipeline_lib.models.stream import BlockModel, tapped
from pipeline_lib.models.transform import Transform
from pipeline_lib.models.verify import verified, with_layouts
from pipeline_lib.models.written import from_json, to_json
from pipeline_lib.prune.collect import collect
from pipeline_lib.prune.plan import plan
from pipeline_lib.prune.run import Rows, Source, prune
from pipeline_lib.stats.moments import MomentSums, drawn_together, prior
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.stats.walk import walk

CPU = torch.device("cpu")
ROWS = token_rows(3, 12)
# One of every structure: fused and split, parallel, norms behind, hybrids, one latent, dense blocks
# before experts, experts in one parameter (also transposed), in files one by one, given all tokens;
# a composite model.
KINDS = (
    "phi3",
    "cohere",
    "olmo2",
    "bamba",
    "qwen3_next",
    "deepseek_v3",
    "granitemoe",
    "gpt_oss",
    "mixtral",
    "llama4_text",
    "gemma3",
)
MIXTURES = ("mixtral", "gpt_oss", "granitemoe", "deepseek_v3")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Path of a tiny random checkpoint of a model type; made once."""
    made: dict[str, Path] = {}

    def path(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = make_checkpoint(tmp_path_factory.mktemp("tiny") / model_type, model_type)
        return made[model_type]

    return path


# Against the table that version 1 had


def digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def facts(layout: Layout) -> dict[str, Any]:
    return {
        "matrices": [
            [m.kind, m.parameter, m.site, m.bias, list(m.rows) if m.rows else None, m.transposed]
            for m in layout.matrices
        ],
        "sites": [
            [site.name, site.coupling, len(site.index), digest(tuple(site.index))] for site in layout.sites
        ],
        "couplings": [
            [
                one.name,
                one.size,
                [
                    [t.parameter, t.axis, t.power, t.offset, digest(tuple(t.index)), digest(t.positions)]
                    for t in one.ties
                ],
            ]
            for one in layout.couplings
        ],
    }


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_what_was_a_table_is_discovered(family: str) -> None:
    """Oracle: matrices, sites and couplings of version 1's hand-written entries, indices by their digests."""
    known = json.loads((Path(__file__).parent / "data" / "layouts.json").read_text(encoding="utf-8"))
    assert facts(discovered(make_config(family))) == known[family]


# Under other names

RENAMED = {
    "q_proj": "first",
    "k_proj": "second",
    "v_proj": "third",
    "o_proj": "last",
    "self_attn": "mixer",
    "input_layernorm": "before",
}
RENAMED |= {
    "gate_proj": "a",
    "up_proj": "b",
    "down_proj": "c",
    "post_attention_layernorm": "between",
    "mlp": "inner",
    "layers": "stack",
}


def test_other_names_change_names_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: Llama's own code with its attributes renamed, and a linear that nothing uses."""
    text = (
        inspect.getsource(modeling_llama)
        .replace("from ...", "from transformers.")
        .replace("from .", "from transformers.models.llama.")
    )
    for old, new in RENAMED.items():
        text = re.sub(rf"\b{old}\b", new, text)
    text = text.replace(
        "        self.inner = LlamaMLP(config)\n",
        "        self.inner = LlamaMLP(config)\n        self.spare = nn.Linear(8, 8)\n",
    )
    text = re.sub(r"^ *@auto_docstring.*\n", "", text, flags=re.MULTILINE)
    module = ModuleType("renamed_llama")
    monkeypatch.setitem(sys.modules, "renamed_llama", module)
    exec(compile(text, "renamed_llama", "exec"), module.__dict__)
    config = make_config("llama")
    with torch.device("meta"):
        other: PreTrainedModel = module.LlamaForCausalLM(config)
    other = other.eval()
    other.model.rotary_emb = skeleton(config, torch.float32).base_model.rotary_emb
    found, plain = discover(other), discover(skeleton(config, torch.float32).eval())
    assert found.blocks == "stack"

    def renamed(name: str | None) -> str | None:
        return name and ".".join(RENAMED.get(part, part) for part in name.split("."))

    for mine, theirs in zip(found.layouts[0].matrices, plain.layouts[0].matrices, strict=True):
        assert replace(mine, kind="") == replace(
            theirs, kind="", parameter=renamed(theirs.parameter), bias=renamed(theirs.bias)
        )
    for one, other_one in zip(found.layouts[0].couplings, plain.layouts[0].couplings, strict=True):
        ties = tuple(replace(tie, parameter=renamed(tie.parameter)) for tie in other_one.ties)
        assert one == replace(other_one, ties=ties)


# Couplings are tried


@pytest.mark.parametrize("model_type", KINDS)
def test_every_coupling_of_every_kind_holds(tiny: Any, model_type: str) -> None:
    """Oracle: the block as transformers runs it, to the bit where no norm's weight is kept as 1 + w."""
    model = BlockModel(open_checkpoint(tiny(model_type)), torch.float32, CPU)
    entry = model.checkpoint.architecture
    assert [failed for _, failed in verified(model)] == [()] * entry.depth
    stream = model.embed(ROWS, len(ROWS))
    for index, layout in enumerate(entry.layouts):
        tensors = model.checkpoint.block(index)
        factors = power_of_two_factors(
            {coupling.name: coupling.size for coupling in layout.couplings}, seed=index
        )
        outputs = [
            model.call(model.block(index, own), index, stream.hidden[0])
            for own in (tensors, fold(tensors, layout, factors))
        ]
        offset = any(tie.offset for coupling in layout.couplings for tie in coupling.ties)
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3 * offset, atol=1e-3 * offset)
        stream.hidden[0] = outputs[0]


def test_a_coupling_that_does_not_hold_is_left_out(tmp_path: Path) -> None:
    """Oracle: Q's factors pair other channels than rotate together. Neither its site nor the others
    are touched.
    """
    checkpoint = open_checkpoint(make_model(tmp_path, "llama"))
    layout = checkpoint.architecture.layouts[0]
    wrong = [
        replace(c, ties=(*c.ties[:-1], replace(c.ties[-1], index=tuple(reversed(c.ties[-1].index)))))
        for c in layout.couplings
    ]
    broken = replace(
        layout,
        couplings=tuple(
            w if w.name in ("q_k", "up_down") else c for w, c in zip(wrong, layout.couplings, strict=True)
        ),
    )
    tried = replace(checkpoint, architecture=with_layouts(checkpoint.architecture, [broken, layout]))
    (first, failed), (second, none) = verified(BlockModel(tried, torch.float32, CPU))
    assert (failed, none) == (("q_k", "up_down"), ())
    assert second == layout
    assert [c.name for c in first.couplings] == ["attention_norm", "v_o", "mlp_norm"]
    assert [site.coupling for site in first.sites] == ["attention_norm", "v_o", "mlp_norm", None]


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gpt_oss"])
def test_an_architecture_is_written_and_read(tiny: Any, model_type: str) -> None:
    entry = open_checkpoint(tiny(model_type)).architecture
    written = json.loads(json.dumps(to_json(entry)))
    assert from_json(written) == entry
    assert isinstance(from_json(written), Architecture)


# Experts


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_see_what_transformers_routes_to_them(tiny: Any, model_type: str) -> None:
    """Oracle: a hook on plain transformers' experts. All tokens that are routed are counted, with
    the weights of the router.
    """
    checkpoint = open_checkpoint(tiny(model_type))
    block = next(number for number, layout in enumerate(checkpoint.architecture.layouts) if layout.routers)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    home = plain.base_model.get_submodule(f"{checkpoint.architecture.blocks}.{block}")
    (experts,) = (
        module
        for module in home.modules()
        if hasattr(module, "down_proj") and isinstance(module.down_proj, torch.nn.Parameter)
    )
    routed: list[Any] = []
    experts.register_forward_pre_hook(lambda _module, args: routed.append(args))
    with torch.no_grad():
        plain(input_ids=ROWS, use_cache=False)
    hidden, chosen, weights = routed[0]

    model = BlockModel(checkpoint, torch.float32, CPU)
    stream, found = model.embed(ROWS, len(ROWS)), {}
    for number in range(block):
        model.advance(model.block(number), number, stream)
    layout = checkpoint.architecture.layouts[block]
    with tapped(model.block(block), layout.sites, lambda *_: None):
        pass
    module = model.block(block)
    with (
        torch.no_grad(),
        tapped(module, layout.sites, lambda site, x, w: found.__setitem__(site.name, (x, w))),
    ):
        model.call(module, block, stream.hidden[0])
    names = sorted(
        {site.name for site in layout.sites if site.pool is not None and site.pool.endswith("input")}
    )
    assert len(names) == len(experts.down_proj)
    assert sum(len(found[name][0]) for name in names if name in found) == chosen.numel()
    for name in names:
        number = int(name.split("_")[1])
        place, token = torch.where(number == chosen.T)
        if name in found:
            x, own = found[name]
            torch.testing.assert_close(x, hidden[token], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own, weights[token, place], rtol=1e-4, atol=1e-5)


def test_a_projection_as_wide_as_there_are_experts_is_no_router() -> None:
    """Oracle: K and V have four outputs here, as the router has for its four experts."""
    config = tiny_config("mixtral")
    config.num_key_value_heads, config.head_dim = 1, 4
    layout = discovered(config)
    assert {"k", "v"} <= {matrix.kind for matrix in layout.matrices}
    assert layout.routers == {"mlp.gate.weight"}


def test_statistics_of_few_tokens_are_drawn_to_all_experts() -> None:
    """Oracles: the formula by hand; the pool's moment if an expert has no tokens; its own, bit for
    bit, if it has all tokens.
    """
    random = torch.Generator().manual_seed(0)
    own, others = torch.randn(5, 8, generator=random), torch.randn(40, 8, generator=random)
    weights = torch.rand(5, generator=random)
    pools = {"few": "a", "many": "a", "none": "a", "alone": "b"}
    found = {name: MomentSums() for name in (*pools, *pools.values())}
    for names, x, w in (
        (("few", "a"), own, weights),
        (("many", "a"), others, None),
        (("alone", "b"), own, weights),
    ):
        for name in names:
            found[name].add(x, weights=w)
    drawn = {name: sums.finish() for name, sums in drawn_together(found, pools).items()}
    square = weights.square()
    single = (own * square[:, None]).T @ own
    pool = (single + others.T @ others) / (square.sum() + 40)
    share = 5 / (5 + prior(8))
    torch.testing.assert_close(drawn["few"].gram, share * single / square.sum() + (1 - share) * pool)
    torch.testing.assert_close(drawn["none"].gram, pool)
    assert [drawn[name].tokens for name in pools] == [5, 40, 0, 5]
    plain = MomentSums()
    plain.add(own, weights=weights)
    assert torch.equal(drawn["alone"].gram, plain.finish().gram)


@pytest.mark.parametrize("onednn", [True, False], indirect=True)
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_statistics_of_experts_in_groups(tiny: Any, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    """SPARSELINE_GRAM_BYTES decides how many experts' Gram matrices are in memory. Oracle: all at
    once, to the last bit, whichever library computes the products.
    """
    checkpoint = open_checkpoint(tiny(model_type))
    settings = CalibrateParams(batch_rows=2, median_tokens=64)
    found, sites = [], [site.name for site in checkpoint.architecture.layouts[0].sites]
    for budget in (10**9, 40_000, 1):
        monkeypatch.setenv("SPARSELINE_GRAM_BYTES", str(budget))
        model = BlockModel(checkpoint, torch.float32, CPU)
        walked = [
            {name: of_site.tensors("") for name, of_site in statistics.items()}
            for _, statistics in walk(model, token_rows(8, 12), token_rows(4, 12), settings, grams=True)
        ]
        stream = model.embed(token_rows(4, 12), 2)
        block = model.block(0)
        each = [[name] for name in sites] if budget == 1 else [sites]
        moments = {
            name: one
            for names in each
            for name, one in collect(model, (0, block), stream.hidden, [[0], [1]], names).items()
        }
        found.append((walked, moments))
    for walked, moments in found[1:]:
        for block_found, expected in zip(walked, found[0][0], strict=True):
            assert block_found.keys() == expected.keys()
            assert all(
                torch.equal(block_found[site][name], expected[site][name])
                for site in expected
                for name in expected[site]
            )
        assert all(torch.equal(moments[name].gram, found[0][1][name].gram) for name in sites)


def test_an_expert_with_all_tokens_is_a_dense_mlp(tmp_path: Path) -> None:
    """Oracle: Mistral with the expert's weights in its MLP, pruned with the same settings."""
    config = tiny_config("mixtral")
    config.num_local_experts = config.num_experts_per_tok = 1
    config.sliding_window = None
    torch.manual_seed(0)
    mixture = AutoModelForCausalLM.from_config(config)
    mixture.save_pretrained(tmp_path / "mixture")
    dense_config = make_config(
        "mistral", layers=config.num_hidden_layers, sliding_window=None, **_sizes(config)
    )
    dense = AutoModelForCausalLM.from_config(dense_config)
    with torch.no_grad():
        taken = mixture.state_dict()
        for name, parameter in dense.named_parameters():
            parameter.copy_(_of_expert(taken, name))
    dense.save_pretrained(tmp_path / "dense")
    one, other = pruned_tensors(tmp_path / "mixture"), pruned_tensors(tmp_path / "dense")
    pairs = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    compared = 0
    for name, tensor in one.items():
        for old, new in pairs.items():
            name = name.replace(f"block_sparse_moe.experts.0.{old}.", f"mlp.{new}.")
        if name in other:
            compared += 1
            assert torch.equal(tensor == 0, other[name] == 0), name
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)
    assert compared == len(other)


def pruned_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's blocks, half of every matrix pruned by the OBS sweep."""
    model = BlockModel(open_checkpoint(path), torch.float32, CPU)
    entry = model.checkpoint.architecture
    kept = {
        (block, matrix): math.prod(model.checkpoint.matrix_shape(block, matrix)) // 2
        for block, matrix in entry.places()
    }
    rows = Rows(token_rows(8, 24), token_rows(0, 24), 4)
    source = Source(model, [Transform()] * entry.depth, kept)
    blocks = prune(source, rows, plan(recipe(["obs"]), torch.float32), lambda _: None)
    return {
        model.checkpoint.block_prefix(index) + name: tensor
        for index, block in blocks
        for name, tensor in block.tensors.items()
    }


def _sizes(config: Any) -> dict[str, Any]:
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
    )
    return {
        name: getattr(config, name)
        for name in (*names, "tie_word_embeddings", "rope_parameters", "max_position_embeddings")
    }


def _of_expert(taken: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A dense parameter, from the mixture with one expert."""
    if ".mlp." not in name:
        return taken[name]
    block, _, part = name.partition(".mlp.")
    if part.startswith("down"):
        return taken[f"{block}.mlp.experts.down_proj"][0]
    gate, up = taken[f"{block}.mlp.experts.gate_up_proj"][0].chunk(2)
    return gate if part.startswith("gate") else up


# Through the pipeline


@pytest.mark.parametrize("model_type", KINDS)
def test_every_kind_is_pruned(tmp_path: Path, model_type: str) -> None:
    """Oracles: plain transformers' perplexity of the files, exact counts, names and shapes of the source."""
    record = attempt(model_type, tmp_path)
    assert record["prunes"], record["reason"]
    assert record["covered"] > 0.9


@pytest.mark.parametrize(("model_type", "reason"), [("whisper", ""), ("deepseek_v4", "do not run once each")])
def test_what_cannot_be_pruned_is_told(tmp_path: Path, model_type: str, reason: str) -> None:
    """By one sentence; a decoder cut out of an encoder-decoder prunes what a text reaches."""
    record = attempt(model_type, tmp_path)
    if reason:
        assert not record["prunes"] and reason in record["reason"]
    else:
        assert record["covered"] < 0.9


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    with pytest.raises(SparselineError, match="encoder-decoder"):
        open_checkpoint(path)


# A model with code of its own


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose architecture transformers does not have, with its code beside it."""
    path = tmp_path_factory.mktemp("fused")
    shutil.copy(Path(__file__).parent / "data" / "fused" / "modeling_fused.py", path)
    own = {
        "AutoConfig": "modeling_fused.FusedConfig",
        "AutoModelForCausalLM": "modeling_fused.FusedForCausalLM",
    }
    described = {
        "model_type": "fused_decoder",
        "architectures": ["FusedForCausalLM"],
        "auto_map": own,
        "vocab_size": VOCABULARY,
    }
    (path / "config.json").write_text(json.dumps(described))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(path, trust_remote_code=True), trust_remote_code=True
    )
    randomise(model, 0)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(path)
    return path


def test_code_of_a_model_s_own_is_run_by_name_only(fused: Path) -> None:
    with pytest.raises(SparselineError, match=r"set model\.remote_code to true if you trust that code"):
        open_checkpoint(fused)
    layout = open_checkpoint(fused, remote_code=True).architecture.layouts[0]
    assert [matrix.kind for matrix in layout.matrices] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert {matrix.rows for matrix in layout.matrices[:3]} == {(0, 32), (32, 64), (64, 96)}
    assert [coupling.name for coupling in layout.couplings] == [
        "attention_norm",
        "v_o",
        "q_k",
        "mlp_norm",
        "up_down",
    ]


def test_a_model_with_code_of_its_own_is_pruned(fused: Path, tmp_path: Path) -> None:
    """Oracle: transformers with that code, which has come along."""
    project = make_workspace(
        tmp_path / "project", variants={"wanda": WANDA | {"export": ["dense", "bitmask"]}}
    )
    change_params(project, "model.path", str(fused))
    change_params(project, "model.remote_code", True)
    with moved(project, environment(project)):
        build(
            "prepare",
            "text calibration",
            "text validation",
            "text test",
            "calibrate",
            "allocate wanda",
            "prune wanda",
        )
        build("evaluate dense", "evaluate wanda", "tasks dense", "tasks wanda", "export wanda")
        written = project / "build/prune/wanda/checkpoint"
        found = load_artifact(project / "build/evaluate/wanda.json")["perplexity"]["test"]
    assert (written / "modeling_fused.py").read_bytes() == (fused / "modeling_fused.py").read_bytes()
    assert perplexity(project, written, "test", trust_remote_code=True) == pytest.approx(found, rel=1e-4)
    exported = AutoModelForCausalLM.from_pretrained(
        project / "build/export/wanda/dense", trust_remote_code=True
    )
    zeros = sum(
        int((p == 0).sum()) for name, p in exported.named_parameters() if "layers" in name and p.ndim == 2
    )
    assert zeros == load_artifact(project / "build/facts/wanda.json")["zeros"]


# Checkpoints in FP8 and MXFP4


def in_fp8(path: Path) -> Path:
    """A tiny Llama whose linears are stored as DeepSeek-V3 stores its own."""
    make_model(path, "llama", hidden_size=64, intermediate_size=96, dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        weight = tensors[name].float()
        blocks = weight.unflatten(0, (-1, 32)).unflatten(2, (-1, 32))
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return quantised(
        path, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    )


def in_mxfp4(path: Path) -> Path:
    """A tiny gpt-oss whose experts are stored as the shipped ones are."""
    config = tiny_config("gpt_oss")
    config.hidden_size = config.intermediate_size = 64
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, 0)
    model.to(torch.bfloat16).save_pretrained(path)
    make_tokenizer(path)
    tensors = load_file(path / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, outputs, inputs // 32, 16), generator=random, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(
            118, 124, (experts, outputs, inputs // 32), generator=random, dtype=torch.uint8
        )
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return quantised(
        path, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    )


def quantised(path: Path, how: dict[str, Any]) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    return path


@pytest.mark.parametrize("make", [in_fp8, in_mxfp4])
def test_packed_weights_are_read_as_transformers_unpacks_them(tmp_path: Path, make: Any) -> None:
    """Oracle: transformers' dequantised model. The result is an ordinary bfloat16 checkpoint."""
    path = make(tmp_path / "source")
    with pytest.raises(SparselineError, match=r"set model\.dequantize to true"):
        open_checkpoint(path)
    how = json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"]
    settings = FineGrainedFP8Config(dequantize=True) if how == "fp8" else Mxfp4Config(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(path, quantization_config=settings, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(path, dequantize=True)
    assert checkpoint.dtype == torch.bfloat16
    for name, parameter in plain.named_parameters():
        found = assembled(
            checkpoint.pieces[name],
            dict(checkpoint.read([piece.stored for piece in checkpoint.pieces[name]])),
        )
        assert torch.equal(found, parameter.data.to(torch.bfloat16)), name

    project = make_workspace(tmp_path / "project", variants={"wanda": WANDA})
    change_params(project, "model.path", str(path))
    change_params(project, "model.dequantize", True)
    with moved(project, environment(project)):
        build(
            "prepare",
            "text calibration",
            "text validation",
            "text test",
            "calibrate",
            "allocate wanda",
            "prune wanda",
        )
        build("evaluate dense", "evaluate wanda")
        found_perplexity = load_artifact(project / "build/evaluate/wanda.json")["perplexity"]["test"]
    written = project / "build/prune/wanda/checkpoint"
    assert "quantization_config" not in json.loads((written / "config.json").read_text())
    assert perplexity(project, written, "test") == pytest.approx(found_perplexity, rel=1e-3)


# A mixture through the whole pipeline


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_mixture_goes_through_every_variant(tmp_path: Path, model_type: str) -> None:
    """All variants of params.yaml and a quantised one; files, report. Oracles: exact counts, plain
    transformers, the codes unpacked again.
    """
    shipped = {name: dict(value) for name, value in shipped_params()["variants"].items()}
    packed = {
        "quantization": {"bits": 4, "group": 16},
        "allocation": {"method": "weight"},
        "export": ["dense", "bitmask"],
    }
    project = make_workspace(tmp_path / "project", variants=shipped | {"packed": packed})
    change_params(project, "model.path", str(make_checkpoint(tmp_path / "source", model_type)))
    with moved(project, environment(project)):
        build(
            "keys",
            "prepare",
            "text calibration",
            "text validation",
            "text test",
            "calibrate",
            "scale",
            "sensitivity",
        )
        build("evaluate dense", "tasks dense")
        for name in (*shipped, "packed"):
            build(
                *(
                    f"{stage} {name}"
                    for stage in (
                        "curves",
                        "allocate",
                        "induce",
                        "prune",
                        "distil",
                        "evaluate",
                        "tasks",
                        "export",
                    )
                )
            )
        build("choose", "report")
        for name in (*shipped, "packed"):
            facts = load_artifact(project / f"build/facts/{name}.json")
            assert facts["kept"] == round(facts["prunable"] / 2)
        best = load_artifact(project / "build/evaluate/best.json")["perplexity"]["test"]
        assert perplexity(project, project / "build/export/best/dense", "test") == pytest.approx(
            best, rel=1e-3
        )
        unpack(project / "build/export/packed/bitmask", tmp_path / "unpacked")
        for one, other in zip(
            sorted(all_tensors(tmp_path / "unpacked").items()),
            sorted(all_tensors(project / "build/export/packed/dense").items()),
            strict=True,
        ):
            assert one[0] == other[0] and torch.equal(one[1], other[1])
        size = load_artifact(project / "build/sizes/packed.json")["formats"]["bitmask"]["bits"]
        assert size < 6, "every expert's codes are stored in four bits"
    report = (project / "report/index.html").read_text(encoding="utf-8")
    assert "Tokens that the router sent to each expert" in report
