"""What sparsity does to speed, as ratios within one run: ``python -m benchmarks.latency``.

On a CUDA GPU, at LLaMA-7B layer shapes in float16: prefill of 2048 tokens and decoding of one,
dense against 2:4 through ``torch.sparse.to_sparse_semi_structured``, matrix by matrix and for a
whole block: with cuSPARSELt's default algorithm, and with the one that its own search finds fastest
for the shape (``2:4, searched``). On a CPU: the same product with a dense matrix, with the same
matrix full of zeros, and through torch's CSR; and loading a bitmask checkpoint against loading a
dense one.

Arms take turns in every repetition, so that a slow moment affects all of them. Times are medians;
ratios are dense over sparse, so that above 1 is faster. On the CPU, one thread runs and its CPU
seconds count, so that other load on the machine matters less.
"""

import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel

from benchmarks.harness import RESULTS, Record, commit
from pipeline_lib.core import products
from pipeline_lib.core.artifacts import write_json
from pipeline_lib.export import bitmask, load
from pipeline_lib.export.encoding import plan
from pipeline_lib.export.groups import Quantisation
from pipeline_lib.export.shards import one_by_one, partition
from pipeline_lib.models.checkpoint import open_checkpoint

PAPER = {"end_to_end": 1.24, "source": "2602.21652, Table 4"}
WIDTH, INNER, HEADS = 4096, 11008, 32  # LLaMA-7B
SHAPES = {"q, k, v, o": (WIDTH, WIDTH), "gate, up": (INNER, WIDTH), "down": (WIDTH, INNER)}
PREFILL, DECODE = 2048, 1
CPU_PREFILL = 256  # tokens: a CSR product of 2048 would take minutes
SPARSITIES = (0.5, 0.7, 0.9)
Arms = Mapping[str, Callable[[], Any]]


def compared(arms: Arms, repetitions: int, inner: int, what: Record) -> list[Record]:
    """Time the arms. Returns a record for each one except the dense one, and prints a line for
    each. ``inner`` calls are timed together; a first round of all arms warms up.
    """
    times = medians(arms, repetitions, inner)
    found = []
    for name, taken in times.items():
        if name != "dense":
            found.append(
                what
                | {
                    "arm": name,
                    "dense_s": times["dense"],
                    "arm_s": taken,
                    "ratio": round(times["dense"] / taken, 3),
                }
            )
            click.echo(
                f"{', '.join(f'{key} {value}' for key, value in what.items())}:"
                f" {name} {found[-1]['ratio']:.2f}x"
            )
    return found


def medians(arms: Arms, repetitions: int, inner: int) -> dict[str, float]:
    """Arm -> median seconds of one call."""
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize()

    def seconds(arm: Callable[[], Any]) -> float:
        wait()
        started = clock()
        for _ in range(inner):
            arm()
        wait()
        return (clock() - started) / inner

    rounds = [{name: seconds(arm) for name, arm in arms.items()} for _ in range(1 + repetitions)][1:]
    return {name: median(one[name] for one in rounds) for name in arms}


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The weights, of which only the larger two of every four consecutive inputs are kept."""
    fours = weight.reshape(weight.shape[0], -1, 4)
    return fours.scatter(-1, fours.abs().topk(2, dim=-1, largest=False).indices, 0).reshape(weight.shape)


def fastest(weight: torch.Tensor, tokens: int) -> int:
    """The number of the algorithm that cuSPARSELt's search finds fastest for x Wᵀ, with a 2:4
    matrix W [R, C] and x [tokens, C].
    """
    # torch pads x in the same way
    x = torch.randn(-(-tokens // 8) * 8, weight.shape[1], device=weight.device, dtype=weight.dtype)
    return torch._cslt_sparse_mm_search(torch._cslt_compress(weight), x.T, transpose_result=True)


def semi_structured(weight: torch.Tensor, tokens: int, searched: bool) -> torch.Tensor:
    """A 2:4 matrix [R, C] in torch's semi-structured format, for products with ``tokens`` tokens."""
    return torch.sparse.to_sparse_semi_structured(weight, alg_id=fastest(weight, tokens) if searched else 0)


def kinds() -> dict[str, bool]:
    """The arms beside dense matrices, and whether each one's algorithm is searched for. Without
    cuSPARSELt there is no search.
    """
    return {"2:4": False} | ({"2:4, searched": True} if torch.backends.cusparselt.is_available() else {})


def decoder_block(tokens: int = PREFILL, searched: bool | None = None) -> LlamaModel:
    """One random block with 2:4 matrices, as dense tensors (``searched`` is None) or in the format
    for them, see ``semi_structured``.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=8, dtype=torch.float16)
    model = LlamaModel(config).to("cuda", torch.float16).eval().requires_grad_(False)
    for module in model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = two_of_four(module.weight)
            chosen = weight if searched is None else semi_structured(weight, tokens, searched)
            module.weight = torch.nn.Parameter(chosen, requires_grad=False)
    return model


@torch.inference_mode()
def matrices_on_gpu(repetitions: int) -> list[Record]:
    """Compare 2:4 with dense single matrices."""
    random = partial(torch.randn, device="cuda", dtype=torch.float16)
    records = []
    for name, shape in SHAPES.items():
        dense = two_of_four(random(shape))
        for phase, tokens in (("prefill", PREFILL), ("decode", DECODE)):
            x = random((tokens, shape[1]))
            weights = {"dense": dense} | {
                name: semi_structured(dense, tokens, searched) for name, searched in kinds().items()
            }
            arms = {name: partial(functional.linear, x, weight) for name, weight in weights.items()}
            what = {"part": "matrix", "matrices": name, "phase": phase, "tokens": tokens, "dtype": "float16"}
            records += compared(arms, repetitions, 20, what)
    return records


@torch.inference_mode()
def block_on_gpu(repetitions: int) -> list[Record]:
    """Compare 2:4 with dense matrices in a decoder block with its attention, norms and cache."""
    x = torch.randn(1, PREFILL, WIDTH, device="cuda", dtype=torch.float16)

    def blocks(tokens: int) -> dict[str, LlamaModel]:
        return {"dense": decoder_block()} | {
            name: decoder_block(tokens, searched) for name, searched in kinds().items()
        }

    prefill = {
        name: partial(block, inputs_embeds=x, use_cache=False) for name, block in blocks(PREFILL).items()
    }
    records = compared(
        prefill, repetitions, 5, {"part": "block", "phase": "prefill", "tokens": PREFILL, "dtype": "float16"}
    )
    del prefill
    steps = {}
    for name, block in blocks(DECODE).items():
        cache = DynamicCache(config=block.config)
        block(inputs_embeds=x, past_key_values=cache, use_cache=True)

        def step(block: LlamaModel = block, cache: DynamicCache = cache) -> None:
            block(inputs_embeds=x[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-DECODE)  # so that every step sees as many tokens

        steps[name] = step
    return records + compared(
        steps, repetitions, 20, {"part": "block", "phase": "decode", "tokens": DECODE, "dtype": "float16"}
    )


@torch.inference_mode()
def on_cpu(repetitions: int) -> list[Record]:
    """Compare dense kernels, with and without zeros, and CSR. Dense kernels do not skip zeros; CSR
    does, and reads an index for every weight that it keeps.
    """
    products.enable_onednn()  # the fastest dense float32 product that is exact, as in the pipeline
    records = []
    for name, shape in SHAPES.items():
        weight, draws = torch.randn(shape), torch.rand(shape)
        for phase, tokens, inner in (("prefill", CPU_PREFILL, 1), ("decode", DECODE, 5)):
            if phase == "prefill" and name != "q, k, v, o":
                continue  # the larger ones give the same result in three times the time
            x = torch.randn(tokens, shape[1])
            for dtype in (torch.float32, torch.bfloat16):
                dense, cast = weight.to(dtype), x.to(dtype)
                arms: dict[str, Callable[[], Any]] = {"dense": partial(functional.linear, cast, dense)}
                for sparsity in SPARSITIES:
                    zeros = torch.where(draws >= sparsity, dense, 0)
                    arms[f"{sparsity:.0%} zeros"] = partial(functional.linear, cast, zeros)
                    if dtype == torch.float32:
                        arms[f"{sparsity:.0%} CSR"] = partial(
                            torch.matmul, zeros.to_sparse_csr(), cast.T.contiguous()
                        )
                kind = str(dtype).removeprefix("torch.")
                what = {"part": "matrix", "matrices": name, "phase": phase, "tokens": tokens, "dtype": kind}
                records += compared(arms, repetitions, inner, what)
    return records


def loading(repetitions: int) -> Record:
    """Measure the loading of a bfloat16 model of 100 M parameters, half of its matrices zeros, from
    the page cache: bytes, and seconds until the model is complete.
    """
    with tempfile.TemporaryDirectory() as home:
        dense, masked = Path(home) / "dense", Path(home) / "bitmask"
        sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=1024)).to(
            torch.bfloat16
        )
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                # a product would leave −0.0, which is stored
                parameter.data.masked_fill_(torch.rand_like(parameter) < 0.5, 0)
        model.save_pretrained(dense)
        source = open_checkpoint(dense)
        plans = {
            file: {name: plan(tensor) for name, tensor in one_by_one(source, names)}
            for file, names in partition(source).items()
        }
        bitmask.write(
            masked,
            plans,
            source,
            Quantisation(Path(home) / "none", source),
            (source.path, source.others),
            indexed=False,
        )
        written = {
            path.name: sum(file.stat().st_size for file in path.glob("*.safetensors"))
            for path in (dense, masked)
        }

        def read() -> float:
            """Load the model, and touch all pages: the official loader maps files and reads nothing
            before.
            """
            loaded = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
            return sum(
                float(parameter.detach().view(-1)[::1024].float().sum()) for parameter in loaded.parameters()
            )

        times = medians({"dense": read, "bitmask": lambda: load.load_model(masked)}, repetitions, 1)
    saved = written["dense"] - written["bitmask"]
    found = {
        "bytes": written,
        "bytes_ratio": round(written["bitmask"] / written["dense"], 4),
        "seconds": times,
        # Below this bandwidth the bytes that need not be read are worth more than the time to check
        # and unpack them.
        "break_even_bytes_per_s": round(saved / max(times["bitmask"] - times["dense"], 1e-9)),
    }
    click.echo(f"loading: {found}")
    return found


@click.command(help=__doc__)
@click.option("--repetitions", default=5, help="Rounds of which medians are taken.")
def main(repetitions: int) -> None:
    gpu = torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(1)
    result = {
        "commit": commit(),
        "device": torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()}), one thread",
        "torch": torch.__version__,
        "repetitions": repetitions,
        "paper": PAPER,
        "products": matrices_on_gpu(repetitions) + block_on_gpu(repetitions) if gpu else on_cpu(repetitions),
        "loading": loading(repetitions),
    }
    write_json(RESULTS / "latency.json", result)


if __name__ == "__main__":
    main()
