"""Run a command, such as `dvc repro`, whose stages start at once: they are forks of this process, which has torch imported already."""

import sys

from pipeline_lib.core import preloaded

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("error: a command is missing; try `python -m stages.preload dvc repro`.")
    preloaded.serve(sys.argv[1:])
