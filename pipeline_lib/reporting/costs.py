"""What the stages cost that ran on this machine: records that DVC does not track, since they differ from run to run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline_lib.reporting import table
from pipeline_lib.reporting.table import Column, Results

FOLDER = Path("build/costs")


@dataclass(frozen=True)
class Cost:
    """What one stage took."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int


Costs = Mapping[str, Cost]  # by stage


def collect(folder: Path = FOLDER) -> dict[str, Cost]:
    """The records of the stages whose output is still the one that they wrote.

    Where the cache served a stage, or another run replaced the output, nothing is known of its cost.

    A record that cannot be read is no record.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            with Path(record["output"]["path"]).open("rb") as output:
                made = hashlib.file_digest(output, "sha256").hexdigest()
            if made == record["output"]["sha256"]:
                found[path.stem] = Cost(float(record["wall_s"]), float(record["cpu_s"]), int(record["peak_rss_bytes"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def comparison(results: Results, costs: Costs) -> list[Column]:
    """The comparison table with the seconds and the peak memory of each variant, where all of its stages ran here."""
    own = [[costs.get(stage) for stage in variant.stages] for variant in results.variants]
    known = [[cost for cost in stages if cost] if all(stages) else [] for stages in own]
    wall = [sum(cost.wall_s for cost in stages) if stages else None for stages in known]
    peak = [max((cost.peak_rss_bytes for cost in stages), default=None) for stages in known]
    columns = table.comparison(results)
    if results.pruned:
        columns.append(table.column_of("cost", "seconds", wall, _seconds, best=min))
        columns.append(table.column_of("cost", "peak GB", peak, _gigabytes, best=min))
    return columns


def by_variant(results: Results, costs: Costs) -> list[Column]:
    """Name, seconds and peak memory of each pruned variant."""
    columns = comparison(results, costs)
    pruned = slice(1, None)
    return [Column("", column.head, column.cells[pruned], numeric=column.numeric) for column in (columns[0], *columns[-2:])]


def by_stage(costs: Costs) -> list[Column]:
    """Every stage that ran here."""
    return [
        Column("", "stage", tuple(costs), numeric=False),
        Column("", "seconds", tuple(_seconds(cost.wall_s) for cost in costs.values())),
        Column("", "CPU seconds", tuple(_seconds(cost.cpu_s) for cost in costs.values())),
        Column("", "peak GB", tuple(_gigabytes(cost.peak_rss_bytes) for cost in costs.values())),
    ]


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"
