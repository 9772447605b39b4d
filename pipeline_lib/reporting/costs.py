"""Costs of the stages that ran on this machine. DVC does not track these records, because they
differ from run to run.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline_lib.core import files
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.reporting import table
from pipeline_lib.reporting.table import Column, Facts, Results

FOLDER = Path("build/costs")
# by stage: wall_s, cpu_s, peak_rss_bytes; peak_gpu_bytes, None where no GPU was used
Costs = Mapping[str, Facts]


def collect(folder: Path = FOLDER) -> dict[str, Facts]:
    """The records of the stages whose output has not changed since.

    The cost is unknown if the output came from the cache or from another run. Records that cannot
    be read are ignored.
    """
    found: dict[str, Facts] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(files.text(path))
            if files.sha256(Path(record["output"]["path"])) == record["output"]["sha256"]:
                gpu = record.get("peak_gpu_bytes")
                own = {key: float(record[key]) for key in ("wall_s", "cpu_s", "peak_rss_bytes")}
                found[path.stem] = own | {"peak_gpu_bytes": None if gpu is None else float(gpu)}
        except (OSError, SparselineError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def by_variant(results: Results, costs: Costs) -> list[Column]:
    """Seconds and peak memory per variant, if all of its stages ran here. The dense model has a row, too.

    The peak memory of a GPU is a column only if a stage used one.
    """
    own = [[costs.get(stage) for stage in table.stages(variant)] for variant in results.variants]
    known = [[cost for cost in stages if cost] if all(stages) else [] for stages in own]
    wall = [sum(cost["wall_s"] for cost in stages) if stages else None for stages in known]
    peak = [max((cost["peak_rss_bytes"] for cost in stages), default=None) for stages in known]
    gpu = [
        max((used for cost in stages if (used := cost["peak_gpu_bytes"]) is not None), default=None)
        for stages in known
    ]
    seconds = table.ranked(
        table.COST, "seconds", wall, lambda value: f"{value:.1f}" if value < 100 else f"{value:,.0f}", min
    )
    columns = [seconds, table.ranked(table.COST, "peak GB", peak, _gigabytes, min)]
    return columns + (
        [table.ranked(table.COST, "peak GPU GB", gpu, _gigabytes, min)]
        if any(used is not None for used in gpu)
        else []
    )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"
