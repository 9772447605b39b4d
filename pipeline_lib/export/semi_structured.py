"""2:4 matrices: check the pattern, and whether ``torch.sparse.to_sparse_semi_structured`` supports
them.
"""

import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from pipeline_lib.core.errors import SparselineError

BACKENDS = {"cutlass": SparseSemiStructuredTensorCUTLASS, "cusparselt": SparseSemiStructuredTensorCUSPARSELT}

Verdict = dict[str, str | None]  # backend -> why it refuses the matrix, or None


def verdict(name: str, weight: torch.Tensor, mask: torch.Tensor, transposed: bool) -> Verdict:
    """The torch backends that support a 2:4 matrix, in its stored dtype, on a CUDA device.

    Raises:
        SparselineError: not two of every four consecutive inputs are kept, or a pruned weight is
            not zero.
    """
    if transposed:
        weight, mask = weight.T, mask.T
    fours = mask.reshape(mask.shape[0], -1, 4) if mask.shape[1] % 4 == 0 else None
    if fours is None or not bool((fours.sum(-1) == 2).all()) or bool((weight[~mask] != 0).any()):
        raise SparselineError(
            f"{name} is not exactly 2:4, though its variant's pattern says so; run `dvc repro` to prune it"
            " again."
        )
    return {backend: _refusal(kind, weight, transposed) for backend, kind in BACKENDS.items()}


def _refusal(kind: type, weight: torch.Tensor, transposed: bool) -> str | None:
    # torch's own table, which its documentation names; the function itself can only be tried on a CUDA device
    limits = kind._DTYPE_SHAPE_CONSTRAINTS  # type: ignore[attr-defined]
    if transposed:
        return "stored transposed (Conv1D)"
    if weight.dtype not in limits:
        return f"{weight.dtype} is not supported"
    rows, columns = limits[weight.dtype].sparse_min_rows, limits[weight.dtype].sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"{list(weight.shape)} is not a multiple of [{rows}, {columns}]"
    return None


def summary(verdicts: dict[str, Verdict]) -> dict[str, object]:
    """Per backend: matrices that qualify, and the others with the reason."""
    return {
        backend: {
            "qualify": sorted(name for name, one in verdicts.items() if one[backend] is None),
            "refused": {
                name: one[backend] for name, one in sorted(verdicts.items()) if one[backend] is not None
            },
        }
        for backend in BACKENDS
    }
