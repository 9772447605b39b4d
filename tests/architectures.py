"""Every causal-LM model type of the installed transformers, tiny, through the pipeline: `python
tests/architectures.py [TYPE ...]`.

Each type gets a random checkpoint, then `prepare`, `text`, `calibrate`, `allocate`, `prune` of
`fast`, and `evaluate`; the result is loaded with plain transformers. A record says what came of it.
Types that have one are passed over, unless they are named.
"""

import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # as a program

import click
import torch
import transformers
from project import build, change_params, environment, invoke, load_artifact, make_workspace, moved
from safetensors.torch import load_file
from tiny import VOCABULARY, make_tokenizer, randomise
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint

RECORDS = Path(__file__).parent.parent / "benchmarks" / "results" / "architectures.json"
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
LIMIT = 300  # seconds for one type
LARGEST = 30_000_000  # parameters that a tiny model may have
SHOWN = 400  # characters of a reason on the page
TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
STEPS = (
    "text calibration",
    "text validation",
    "text test",
    "calibrate",
    "sensitivity",
    "curves fast",
    "allocate fast",
    "prune fast",
    "evaluate fast",
)

# What configs call the same thing, and how large it is here
_SIZES: dict[int | float | None, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim model_dim emb_dim",
    48: (
        "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff intermediate_dim intermediate_size_mlp"
        " encoder_ffn_dim decoder_ffn_dim dff"
    ),
    4: (
        "num_hidden_layers n_layer n_layers decoder_layers num_attention_heads n_head n_heads num_heads"
        " encoder_attention_heads decoder_attention_heads num_experts n_routed_experts num_local_experts"
        " moe_num_experts num_moe_experts qk_rope_head_dim mamba_num_heads mamba_n_heads mamba_dt_rank"
        " linear_num_value_heads linear_num_heads rotary_dim n_mamba_heads num_layers"
    ),
    2: (
        "num_key_value_heads encoder_layers num_experts_per_tok num_experts_per_token moe_topk moe_k top_k"
        " moe_top_k linear_num_key_heads zero_expert_num index_n_heads num_query_groups"
    ),
    8: (
        "head_dim attention_head_dim global_head_dim qk_nope_head_dim v_head_dim mamba_d_state ssm_state_size"
        " state_size mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim linear_head_dim"
        " hidden_size_per_layer_input index_head_dim kv_channels"
    ),
    4096: "max_position_embeddings n_positions max_seq_len max_sequence_length model_max_length",
    16: (
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size"
        " shared_intermediate_size router_hidden_size moe_shared_expert_intermediate_size q_lora_rank"
        " kv_lora_rank mamba_head_dim mamba_d_head shared_experts_intermediate_size"
    ),
    1: (
        "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups n_groups"
        " num_expert_group"
    ),
    64: "mamba_d_ssm",
    6: "sliding_window attention_window",
    0: (
        "bos_token_id eos_token_id dropout attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop"
        " layerdrop"
    ),
    None: "pad_token_id moe_latent_size",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
# given although a config leaves them open
UNSET = ("num_key_value_heads", "head_dim", "intermediate_size", "n_inner")
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}  # keys and values from one latent: as many heads
_PADDED = {"pad_token_id": 1}
_HALF = {"layer_types": ["full_attention"] * 4}
# What a type wants otherwise; REMOVED: its own default.
REMOVED = object()
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "youtu",
            "longcat_flash",
        ],
        _LATENT,
    ),
    **dict.fromkeys(
        ["roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "roberta-prelayernorm"],
        _PADDED,
    ),
    **dict.fromkeys(["cohere_compass_text", "dots1"], _HALF),
    "bailing_hybrid": _LATENT | {"num_expert_group": 2, "topk_group": 1, "head_dim": 4},
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2},
    "dots1": _HALF | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": (
        _LATENT | {"per_layer_config": {}, "layer_types": ["sliding_attention"] * 4, "rope_parameters": None}
    ),
    "cpmant": {"dim_ff": 48, "dim_head": 8},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "emu3_text_model": {"pad_token_id": 0},
    "cohere_compass_text": (
        _HALF | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    ),
    "gemma4_text": {"per_layer_config": {}, "hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "modernbert-decoder": {"pad_token_id": 0},
    "mpt": {},
    "prophetnet": {"pad_token_id": 0},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {
        f"{name}_{part}": 8 for name in ("pronunciation", "shape") for part in ("embed_dim", "vocab_size")
    },
    "xmod": _PADDED | {"default_language": "en_XX"},
    "zamba2": {"num_hidden_layers": 54},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A small config of a model type: its defaults, with the sizes that have a name here made small."""
    kind = CONFIG_MAPPING[model_type]
    usual = kind()
    values = _small(usual.to_dict())
    for name in getattr(kind, "sub_configs", None) or {}:
        if (part := getattr(usual, name, None)) is not None and hasattr(part, "model_type"):
            values[name] = {
                "model_type": part.model_type,
                **_small(part.to_dict()),
                **OWN.get(part.model_type, {}),
            }
    values |= OWN.get(model_type, {})
    return kind(**{name: value for name, value in values.items() if value is not REMOVED})


def _small(values: Mapping[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in values.items():
        size = SIZES.get(name)
        if (
            name not in SIZES
            or isinstance(value, bool)
            or not (isinstance(value, int | float) or (value is None and name in UNSET))
        ):
            continue
        small[name] = size if size is None or value is None else type(value)(size)
    return small


def make_checkpoint(directory: Path, model_type: str) -> Path:
    """A random model of the type, with a tokenizer."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are too many for a trial")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, 0)
    model.save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def attempt(model_type: str, directory: Path) -> dict[str, Any]:
    """What the pipeline makes of a type.

    Raises:
        AssertionError: a stage ends otherwise than well or by a sentence, or its result is not what
            transformers makes of the files.
    """
    record: dict[str, Any] = {
        "model_type": model_type,
        "prunes": False,
        "covered": None,
        "couplings": [],
        "experts": 0,
        "reason": None,
    }
    try:
        source = make_checkpoint(directory / "source", model_type)
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".splitlines()
        return record | {"reason": f"no tiny model can be made: {lines[0][:200]}"}
    project = make_workspace(directory / "project", variants={"fast": _fast()})
    change_params(project, "model.path", str(source))
    with moved(project, environment(project)):
        prepared = invoke("prepare")
        if prepared.exit_code == 2:
            return record | {
                "reason": (
                    prepared.output.strip()
                    .splitlines()[-1]
                    .removeprefix("error: ")
                    .replace(str(source), "the model")
                )
            }
        assert prepared.exit_code == 0, prepared.output[-3000:]
        build(*STEPS)
        checkpoint = open_checkpoint(source)
        facts, measured = (
            load_artifact(project / f"build/{stage}/fast.json") for stage in ("facts", "evaluate")
        )
    layouts = checkpoint.architecture.layouts
    assert facts["kept"] == round(facts["prunable"] / 2), facts["kept"]
    _check_names(checkpoint, project / "build/prune/fast/checkpoint")
    found = measured["perplexity"]["test"]
    plain = perplexity(project, project / "build/prune/fast/checkpoint", "test")
    assert abs(plain / found - 1) < 1e-3, f"perplexity {plain} with plain transformers, {found} here"
    couplings = sorted(
        {
            coupling.name.split(".")[-1]
            for layout in layouts
            for coupling in layout.couplings
            if not coupling.name.startswith("expert_")
        }
    )
    experts = max(
        len({matrix.site for matrix in layout.matrices if layout.site(matrix.site).pool is not None}) // 2
        for layout in layouts
    )
    return record | {
        "prunes": True,
        "covered": round(checkpoint.coverage, 4),
        "couplings": couplings,
        "experts": experts,
    }


def _fast() -> Any:
    from ruamel.yaml import YAML

    shipped = YAML(typ="safe").load(Path(__file__).parent.parent / "params.yaml")
    fast = dict(shipped["variants"]["fast"])
    fast["reconstruction"] = fast["reconstruction"] | {"lsq": {"mask_iterations": 8, "iterations": 8}}
    return fast


def _check_names(source: Checkpoint, pruned: Path) -> None:
    """Every tensor keeps its name, its shape and its type."""
    written = open_checkpoint(pruned)
    assert written.shapes == source.shapes
    assert written.dtype == source.dtype


def perplexity(project: Path, checkpoint: Path, text: str, **settings: Any) -> float:
    """Of a written checkpoint on a project's text, by transformers alone."""
    rows = load_file(Workspace(project).texts("evaluate") / f"{text}.safetensors")["rows"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **settings).eval()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(row[None], use_cache=False).logits[0, :-1].float(), row[1:]
            )
            for row in rows
        ]
    return math.exp(float(torch.stack(losses).mean()))


def in_a_fork(model_type: str) -> dict[str, Any]:
    """A trial that may crash or hang."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        signal.alarm(LIMIT)
        try:
            with (
                tempfile.TemporaryDirectory() as directory,
                Path(os.devnull).open("w") as null,
                redirect_stderr(null),
                redirect_stdout(null),
            ):
                told: dict[str, Any] = attempt(model_type, Path(directory))
        except BaseException:
            told = {"model_type": model_type, "fault": traceback.format_exc()[-3000:]}
        os.write(writing, json.dumps(told).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = json.loads(
            pipe.read()
            or json.dumps({"model_type": model_type, "fault": f"no end within {LIMIT} s, or a crash"})
        )
    os.waitpid(pid, 0)
    return told


def page(records: list[dict[str, Any]]) -> str:
    """docs/architectures.md."""
    good = [one for one in records if one["prunes"]]
    most = sum(one["covered"] >= 0.9 for one in good)
    lines = [
        "# Which model types can be pruned",
        "",
        f"`make architectures` wrote this page with transformers {transformers.__version__}, which has"
        f" {len(TYPES)} causal-LM model types.",
        "",
        f"- **{most}** can be pruned, with at least 90% of a block's weights covered.",
        f"- {len(good) - most} can be pruned with a lower coverage.",
        f"- {len(records) - len(good)} are refused.",
        "",
        "A tiny random model of each type went through `prepare`, `calibrate`, `sensitivity`, `allocate`,",
        "`prune` (`fast`) and `evaluate`. Plain transformers gave the written files the same perplexity.",
        "*Covered* is the share of the blocks' weights that are in prunable matrices: all elements of",
        "parameters with two or more dimensions, except routers. This table shows that a type works, not",
        "how good the result is.",
        "",
        "| model type | covered | experts | couplings that hold |",
        "|---|---|---|---|",
        *(
            f"| {one['model_type']} | {one['covered']:.1%} | {one['experts'] or ''} |"
            f" {', '.join(one['couplings'])} |"
            for one in good
        ),
        "",
        "Refused:",
        "",
        "| model type | why |",
        "|---|---|",
        *(f"| {one['model_type']} | {_short(one['reason'])} |" for one in records if not one["prunes"]),
    ]
    return "\n".join(lines) + "\n"


def _short(reason: str) -> str:
    """For a cell of a table: transformers lists all its classes in some messages."""
    text = reason.replace("|", "/")
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


@click.command(help=__doc__)
@click.argument("types", nargs=-1)
@click.option("--record", type=click.Path(path_type=Path), default=RECORDS)
def main(types: tuple[str, ...], record: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    known = {one["model_type"]: one for one in json.loads(record.read_text())} if record.exists() else {}
    faults = 0
    for model_type in types or [name for name in TYPES if name not in known]:
        begun = time.monotonic()
        told = in_a_fork(model_type)
        if "fault" in told:
            faults += 1
            click.echo(f"{model_type}: FAULT\n{told['fault']}")
            known.pop(model_type, None)
        else:
            known[model_type] = told
            ended = (
                f"{told['covered']:.1%} covered, {told['experts']} experts"
                if told["prunes"]
                else f"refused: {told['reason']}"
            )
            click.echo(f"{model_type}: {ended}; {time.monotonic() - begun:.0f} s")
        record.write_text(
            json.dumps([known[name] for name in sorted(known)], indent=1) + "\n", encoding="utf-8"
        )
    if record == RECORDS:
        PAGE.write_text(page([known[name] for name in sorted(known)]), encoding="utf-8")
    good = sum(one["prunes"] and one["covered"] >= 0.9 for one in known.values())
    click.echo(f"{good} of {len(TYPES)} prune with at least 90% covered; {faults} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
