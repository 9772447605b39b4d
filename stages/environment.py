"""Write the installed versions into env.lock.json, which is part of every stage's key.

This is not a stage; `make environment` calls it.
"""

import sys

import click

from pipeline_lib.core import environment
from pipeline_lib.core.errors import SparselineError


@click.command(help=__doc__)
def main() -> None:
    try:
        if environment.write():
            versions = ", ".join(f"{name} {version}" for name, version in environment.running().items())
            click.echo(
                f"{environment.FILE}: now says {versions}; results of other versions stay in the cache"
            )
    except SparselineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
