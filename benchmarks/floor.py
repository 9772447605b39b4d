"""The *floor* of SparseGPT: the work that it cannot avoid, as bare library calls on transformers' own
modules.

It has two forward passes of every block: one that ends before its last product, and one through the
pruned block, which is a single batch in the last block. It has a Gram matrix, two Cholesky
factorisations and an inverse per site, and per matrix [R, C] one product with R·C²/2 multiply-adds.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from benchmarks.alone import cost, wait
from benchmarks.harness import Record
from benchmarks.lab import Lab
from pipeline_lib.models.whole import load_model
from pipeline_lib.stats.lanes import deal


class _Enough(Exception):
    """Raised when a forward pass has reached what is wanted of it."""


@torch.inference_mode()
def least(here: Lab) -> Record:
    """The cost of the floor on a model's calibration rows, in this process, and its ``parts`` in
    seconds.
    """
    bed, rows = here.bed, torch.cat([here.rows["fit"], here.rows["held_out"]])
    device, entry = bed.device, bed.checkpoint.architecture
    batches = rows.split(deal(len(rows), 4).sizes)  # those of the variant sparsegpt
    model = load_model(bed.path, "float32", device)
    blocks: Any = model.base_model.get_submodule(entry.blocks)
    parts = dict.fromkeys(("forward", "gram", "factor", "products"), 0.0)

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        wait(device)
        started = time.perf_counter()
        yield
        wait(device)
        parts[part] += time.perf_counter() - started

    def embedded(batch: torch.Tensor) -> tuple[Any, dict[str, Any]]:
        """What the first block is called with."""
        calls: list[tuple[Any, dict[str, Any]]] = []

        def see(_: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.append((args[0], named))
            raise _Enough

        handle = blocks[0].register_forward_pre_hook(see, with_kwargs=True)
        with suppress(_Enough):
            model.base_model(input_ids=batch.to(device), use_cache=False)
        handle.remove()
        return calls[0]

    def work() -> None:
        with timed("forward"):
            calls = [embedded(batch) for batch in batches]
        for index, block in enumerate(blocks):
            layout = entry.layouts[index]
            sites = [
                [
                    block.get_submodule(matrix.parameter.removesuffix(".weight"))
                    for matrix in layout.consumers(site.name)
                ]
                for site in layout.sites
            ]
            inputs: dict[Any, torch.Tensor] = {}

            def see(
                module: torch.nn.Module,
                args: tuple[Any, ...],
                inputs: dict[Any, torch.Tensor] = inputs,
                number: int = len(sites),
            ) -> None:
                inputs[module] = args[0].flatten(0, -2)
                if len(inputs) == number:
                    raise _Enough

            sizes = {site[0]: site[0].weight.shape[1] for site in sites}
            grams = {first: torch.zeros(size, size, device=device) for first, size in sizes.items()}
            handles = [first.register_forward_pre_hook(see) for first in sizes]
            for hidden, named in calls:
                inputs.clear()
                with timed("forward"), suppress(_Enough):
                    block(hidden, **named)
                with timed("gram"):
                    for first, x in inputs.items():
                        grams[first].addmm_(x.T, x)
            for handle in handles:
                handle.remove()
            inputs.clear()
            for site in sites:
                with timed("factor"):
                    gram = grams.pop(site[0])
                    gram.diagonal().add_(gram.diagonal().mean(), alpha=0.01)
                    upper = torch.linalg.cholesky_ex(
                        torch.cholesky_inverse(torch.linalg.cholesky_ex(gram).L), upper=True
                    ).L
                    half = upper[:, : upper.shape[0] // 2]
                with timed("products"):
                    for linear in site:
                        torch.mm(linear.weight, half)
            for number in range(len(calls) if index + 1 < len(blocks) else 1):
                hidden, named = calls[number]
                with timed("forward"):
                    out = block(hidden, **named)
                calls[number] = (out[0] if isinstance(out, tuple) else out), named

    return cost(work, device) | {"parts": {part: round(seconds, 3) for part, seconds in parts.items()}}
