"""Score distributions before and after induction, as histograms (2602.21652, Fig. 1)."""

from collections.abc import Mapping
from typing import Any

import torch

from pipeline_lib.induce.induce import Outcome

BINS = 48


def histograms(outcomes: Mapping[int, Outcome]) -> dict[str, Any]:
    """Per matrix kind: common edges of log10 score [BINS + 1] and the share of weights per bin before and after."""
    result: dict[str, Any] = {}
    kinds = sorted({kind for outcome in outcomes.values() for kind in outcome.scores})
    for kind in kinds:
        pairs = [outcome.scores[kind] for outcome in outcomes.values() if kind in outcome.scores]
        before, after = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
        both = torch.cat([before, after]).sort().values
        low, high = float(both[len(both) // 1000]), float(both[-1 - len(both) // 1000])
        shares = [torch.histc(side.clamp(low, high), BINS, low, high) / side.numel() for side in (before, after)]
        step = (high - low) / BINS
        result[kind] = {
            "edges": [round(low + i * step, 4) for i in range(BINS + 1)],
            "before": [round(float(share), 6) for share in shares[0]],
            "after": [round(float(share), 6) for share in shares[1]],
        }
    return result
