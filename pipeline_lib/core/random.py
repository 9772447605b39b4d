"""Keyed randomness."""

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    """Randomness that depends on the seed and the purpose, never on the order of calls."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
