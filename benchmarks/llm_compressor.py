"""Prune a model with llm-compressor, from the same token ids. ``benchmarks.rivals`` runs this with
the Python of an environment of its own.

``python benchmarks/llm_compressor.py MODEL ROWS METHOD SPARSITY PATTERN OUT [BATCH]`` writes the
pruned linears and prints the cost as JSON: seconds from model in memory to pruned, and peak memory
above what was there before, also a GPU's if there is one. Needs nothing of this project.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def resident(name: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    path, rows_file, method, sparsity, pattern, out, batch = [*sys.argv[1:], "1"][:7]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    data = [
        {"input_ids": row, "attention_mask": torch.ones_like(row)} for row in load_file(rows_file)["rows"]
    ]
    loader = DataLoader(data, batch_size=int(batch), shuffle=False)
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    structure = "0:0" if pattern == "unstructured" else pattern
    recipe = [
        modifier(
            sparsity=float(sparsity), mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"]
        )
    ]
    gpu = torch.cuda.is_available()
    if gpu:  # what its libraries load at first is not counted
        square = torch.eye(64, device="cuda")
        torch.cholesky_inverse(torch.linalg.cholesky_ex(square @ square).L)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held, before = torch.cuda.memory_allocated() if gpu else 0, resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
    cpu, started = time.process_time(), time.perf_counter()
    oneshot(
        model=model,
        dataset=loader,
        recipe=recipe,
        pipeline="sequential",
        num_calibration_samples=len(data),
        shuffle_calibration_samples=False,
    )
    if gpu:
        torch.cuda.synchronize()
    cost = {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "peak_rss_bytes": resident("VmHWM") - before,
    }
    if gpu:
        cost["peak_gpu_bytes"] = torch.cuda.max_memory_allocated() - held
    linears = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    }
    save_file({f"{name}.weight": weight.detach().contiguous() for name, weight in linears.items()}, out)
    print(json.dumps(cost | {"threads": torch.get_num_threads()}), flush=True)
    os._exit(0)  # its loggers and threads need not finish


if __name__ == "__main__":
    main()
