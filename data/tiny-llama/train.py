"""Train the embedded model: a 3.2 M-parameter Llama on Python source code.

    python data/tiny-llama/train.py --output data/tiny-llama

Reads the standard library and the installed packages' ``.py`` files, without the modules that
``data/held_out.json`` holds out for calibration, validation and test, and without any file that
repeats them. Writes tokenizer, config, bf16 safetensors and ``training.json``, from which the model
card quotes. The first run leaves its tokens in ``--work``, so a repeat starts at once.
"""

import hashlib
import itertools
import json
import math
import platform
import random
import sysconfig
import time
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=None,
)


def _lines(text: str) -> set[str]:
    """Lines long enough that sharing them means copying."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 30}


def collect(held_out: list[str], seed: int) -> tuple[list[str], list[str], dict[str, int]]:
    """Training files: all of the standard library first, then packages in random order; copies of
    held-out modules dropped.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    packages = Path(sysconfig.get_paths()["purelib"])
    held_lines = set().union(*(_lines((stdlib / name).read_text(encoding="utf-8")) for name in held_out))
    seen = {hashlib.sha256((stdlib / name).read_bytes()).hexdigest() for name in held_out}
    dropped = {"duplicate": 0, "repeats held-out text": 0, "size or encoding": 0}
    texts: dict[str, list[str]] = {"stdlib": [], "packages": []}
    for kind, root in (("stdlib", stdlib), ("packages", packages)):
        files = sorted(root.rglob("*.py"))
        random.Random(seed).shuffle(files)
        for path in files:
            if kind == "stdlib" and (
                "site-packages" in path.parts or str(path.relative_to(stdlib)) in held_out
            ):
                continue
            raw = path.read_bytes()
            digest = hashlib.sha256(raw).hexdigest()
            if digest in seen:
                dropped["duplicate"] += 1
                continue
            seen.add(digest)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = ""
            if not 200 <= len(text) <= 300_000:
                dropped["size or encoding"] += 1
                continue
            lines = _lines(text)
            if len(lines & held_lines) > 0.05 * len(lines) + 2:
                dropped["repeats held-out text"] += 1
                continue
            texts[kind].append(text)
    return texts["stdlib"], texts["packages"], dropped


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], limit: int) -> np.ndarray:
    """Documents, each behind an end-of-text token, concatenated to at most ``limit`` tokens."""
    out: list[int] = []
    for start in range(0, len(texts), 256):
        for ids in tokenizer(texts[start : start + 256], add_special_tokens=False)["input_ids"]:
            out += [0, *ids]
        if len(out) >= limit:
            break
    return np.array(out[:limit], dtype=np.uint16)


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=rows).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden)
    return torch.nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1)
    )


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("/tmp/sparseline-train"), show_default=True
)
@click.option(
    "--minutes",
    default=55.0,
    show_default=True,
    help="Training time at the measured speed; fixes the number of steps.",
)
@click.option(
    "--steps",
    default=0,
    show_default=True,
    help="Exact number of steps instead of --minutes (to repeat a run).",
)
@click.option("--batch", default=32, show_default=True, help="Rows of 256 tokens in one step.")
@click.option("--rate", default=4e-3, show_default=True, help="Peak learning rate of AdamW.")
@click.option("--seed", default=0, show_default=True)
def main(output: Path, work: Path, minutes: float, steps: int, batch: int, rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    held_out = json.loads((Path(__file__).parent.parent / "held_out.json").read_text())
    stdlib_root = Path(sysconfig.get_paths()["stdlib"])
    if not (work / "tokens.npy").exists():
        own, packages, dropped = collect(sorted(itertools.chain(*held_out.values())), seed)
        tokenizer = train_tokenizer(own[::4] + packages[: len(own) // 4])
        tokenizer.save_pretrained(work)
        texts = own + packages[: 3 * len(own)]
        random.Random(seed).shuffle(texts)
        tokens = encode(tokenizer, texts, 40_000_000)
        np.save(work / "tokens.npy", tokens)
        facts = {"stdlib_files": len(own), "package_files": len(texts) - len(own), "dropped": dropped}
        (work / "facts.json").write_text(json.dumps(facts))
        click.echo(f"{facts}, {len(tokens):,} tokens")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    tokens = torch.from_numpy(np.load(work / "tokens.npy").astype(np.int64))
    rows = tokens[: len(tokens) // 256 * 256].view(-1, 256)
    rows = rows[torch.randperm(len(rows))]
    held = [(stdlib_root / name).read_text(encoding="utf-8") for name in held_out["validation"]]
    valid = torch.from_numpy(encode(tokenizer, held, 128 * 256).astype(np.int64)).view(-1, 256)

    model = LlamaForCausalLM(CONFIG)
    decay = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    start, step, last = time.monotonic(), 0, time.monotonic()
    while True:
        if step == 10:
            start = time.monotonic()
        if step == 40 and not steps:  # the speed is known: fix the schedule's length
            steps = int(minutes * 60 / ((time.monotonic() - start) / 30))
        if steps and step >= steps:
            break
        progress = step / steps if steps else 0.0
        for group in optimiser.param_groups:
            group["lr"] = (
                rate * min((step + 1) / 100, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            )
        pick = torch.arange(step * batch, (step + 1) * batch) % len(rows)
        loss = loss_of(model, rows[pick])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            speed = 50 * batch * 256 / (time.monotonic() - last)
            last = time.monotonic()
            click.echo(f"step {step}/{steps} loss {loss.item():.3f} {speed:.0f} tokens/s")
        if step % 500 == 0:
            with torch.no_grad():
                click.echo(
                    "  validation perplexity"
                    f" {math.exp(np.mean([loss_of(model, part).item() for part in valid.split(16)])):.3f}"
                )
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        perplexity = math.exp(np.mean([loss_of(model, part).item() for part in valid.split(16)]))
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    facts = json.loads((work / "facts.json").read_text())
    facts |= {
        "steps": steps,
        "batch": batch,
        "tokens": steps * batch * 256,
        "rate": rate,
        "seed": seed,
        "torch": torch.__version__,
    }
    facts |= {"validation_perplexity": round(perplexity, 3), "python": platform.python_version()}
    (output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    click.echo(f"validation perplexity {perplexity:.3f}")


if __name__ == "__main__":
    main()
