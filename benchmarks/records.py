"""What every record of a benchmark carries."""

import subprocess
from pathlib import Path


def commit() -> str:
    """The commit that is checked out."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    return found.stdout.strip()
