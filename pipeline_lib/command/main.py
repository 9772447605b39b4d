"""Prune Hugging Face language models in one shot, in a DVC project that uses the installed library.

`prune` does the common case in one line. `init` creates a project for a team; `run`, `plan`, `submit`
and `report` work in it.
"""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline_lib.command import choices, layout, project
from pipeline_lib.core import environment, runtime

DIRECTORY = click.Path(file_okay=False, path_type=Path)
PASSED = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def _in(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option of a command that works in a project."""
    return click.option(
        "-C",
        "directory",
        type=DIRECTORY,
        default=Path(),
        help="The project's directory. Default: the current one.",
    )(command)


@click.group(help=__doc__, invoke_without_command=True, context_settings={"max_content_width": 100})
@click.version_option(package_name="sparseline")
@click.pass_context
def commands(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@commands.command()
@click.argument("directory", type=DIRECTORY)
@click.option(
    "--git/--no-git",
    default=None,
    help="Whether to run `git init`, which `dvc exp` needs. Default: ask in a terminal.",
)
@click.option(
    "--update", is_flag=True, help="Update dvc.yaml and stages/ of a project after an upgrade of the library."
)
def init(directory: Path, git: bool | None, update: bool) -> None:
    """Create a project in DIRECTORY: parameters, the graph, and thin stages."""
    if update:
        layout.write(project.opened(directory), layout.renewed())
        environment.write(directory / environment.FILE)
        click.echo(f"{directory}: {layout.GRAPH} and stages/ are those of the installed version")
        return
    layout.lay_out(directory, layout.shipped())
    environment.write(directory / environment.FILE)
    possible = project.can_begin(directory)
    if git is None and possible and sys.stdin.isatty():
        git = click.confirm(
            f"Run `git init` in {directory}? `dvc exp` needs git; everything else works without it",
            default=True,
        )
    if git and possible:
        project.begin(directory)
    project.settle(directory)
    click.echo(
        f"{directory} is a project. Set the model, the texts and the variants in {directory / layout.PARAMS}."
        " Then:"
    )
    within = "" if directory.resolve() == Path.cwd() else f" -C {shlex.quote(str(directory))}"
    click.echo(f"  sparseline plan{within}    # memory, disk and rough time of every stage")
    click.echo(f"  sparseline run{within}     # run all stages that are out of date, and print the table")
    if not project.tracked(directory):
        click.echo(
            "This directory has no git repository. `dvc exp` needs `git init` and a commit; everything"
            " else works without."
        )
    elif git:
        click.echo("The files are added to git; commit them before the first `dvc exp run`.")


@commands.command()
@click.argument("model")
@click.option("--out", "directory", type=DIRECTORY, required=True, help="Directory of the new project.")
@click.option(
    "--preset",
    type=click.Choice(["fast", "best", "distilled"]),
    default="fast",
    show_default=True,
    help="How to prune.",
)
@click.option(
    "--sparsity",
    type=click.FloatRange(0, 1, True, True),
    help="Share of the prunable weights that become zero. Default: 0.5.",
)
@click.option("--pattern", help="N:M: keep N weights of every M inputs, for example 2:4.")
@click.option(
    "--calibration",
    help="A file or directory of text, or a name in data/hub.json. Default: Python's standard library.",
)
@click.option(
    "--revision", help="Commit of a model from the hub. Default: the newest one, which is recorded."
)
def prune(directory: Path, **options: Any) -> None:
    """Prune MODEL: a directory, a name on the hub, or `embedded`, a tiny example model."""
    given = choices.Choices(**options)
    choices.outside(directory, given)
    wanted = choices.chosen(layout.shipped(), given)
    layout.unused(directory, wanted)
    layout.lay_out(directory, wanted)
    _run(directory)
    click.echo(f"model: {directory / 'build/export' / options['preset'] / 'dense'}")


@commands.command(context_settings=PASSED)
@_in
@click.argument("targets", nargs=-1, type=click.UNPROCESSED)
def run(directory: Path, targets: tuple[str, ...]) -> None:
    """Run all stages that are out of date, or only TARGETS of `dvc repro`, and print the table."""
    _run(project.opened(directory), *targets)


@commands.command(context_settings=PASSED)
@_in
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def plan(directory: Path, arguments: tuple[str, ...]) -> None:
    """Predict memory, disk and rough time of every stage. ARGUMENTS may be --device and --gpu-memory."""
    project.opened(directory)
    project.settle(directory)
    sys.exit(project.call(directory, "python", "-m", "stages.plan", *arguments))


@commands.command(context_settings=PASSED)
@_in
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def submit(directory: Path, arguments: tuple[str, ...]) -> None:
    """Submit variants as jobs to Slurm, or as processes with --local. ARGUMENTS are variants, and options
    such as --sbatch mem=64G. If no variant is named, all are submitted.
    """
    project.opened(directory)
    project.settle(directory)
    sys.exit(project.call(directory, "python", "-m", "stages.submit", *arguments))


@commands.command()
@_in
def report(directory: Path) -> None:
    """Print the table of the last run, and the path of the report."""
    _report(project.opened(directory))


@commands.command(name="environment")
@_in
def write_environment(directory: Path) -> None:
    """Write the installed versions into env.lock.json, a part of every result's key. `run` does so,
    too.
    """
    sys.exit(project.call(project.opened(directory), "python", "-m", "stages.environment"))


def _run(directory: Path, *targets: str) -> None:
    project.settle(directory)
    if code := project.run(directory, *targets):
        sys.exit(code)
    if not targets:
        click.echo()
        _report(directory)


def _report(directory: Path) -> None:
    if code := project.call(directory, "python", "-m", "stages.costs"):
        sys.exit(code)
    click.echo(f"\nreport: {directory / 'report/index.html'}")


def main() -> None:
    """Run a command. Invalid input gives a one-sentence error and exit code 2."""
    with runtime.told():
        try:
            sys.exit(commands.main(prog_name="sparseline", standalone_mode=False))
        except click.Abort:
            sys.exit(130)
        except click.ClickException as error:
            said = " ".join(error.format_message().split())
            click.echo(f"error: {said} See `sparseline --help`.", err=True)
            sys.exit(2)


if __name__ == "__main__":
    main()
