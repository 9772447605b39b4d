"""Change the numeric code in a hundred places, one at a time, and see which changes the tests
notice: ``python tests/mutants.py [--old COMMIT]``.

A mutant swaps an operator or moves a constant. With ``--old`` it is tried on that commit first,
wherever its statement is there; one that died there and survives here is a loss, and ends the
command with 1.
"""

import argparse
import ast
import copy
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {  # module of the library -> tests that are named for it, on either side of a move
    "masks/select.py": "test_patterns test_scores",
    "masks/scores.py": "test_scores",
    "solve/factor.py": "test_scores",
    "solve/order.py": "test_scores",
    "solve/sweep.py": "test_scores test_quantization",
    "solve/lsq.py": "test_lsq",
    "solve/grid.py": "test_quantization",
    "stats/moments.py": "test_statistics",
    "fit/fit.py": "test_fit",
    "fit/spectral.py": "test_spectral",
    "allocate/budget.py": "test_budget test_allocation",
    "allocate/predicted.py": "test_allocation",
    "measure/estimate.py": "test_sensitivity",
    "induce/removed.py": "test_induce",
    "induce/scale.py": "test_scale",
    "models/folding.py": "test_folding",
}
SWAPPED = {
    **{
        ast.Lt: ast.LtE,
        ast.LtE: ast.Lt,
        ast.Gt: ast.GtE,
        ast.GtE: ast.Gt,
        ast.Eq: ast.NotEq,
        ast.NotEq: ast.Eq,
    },
    **{
        ast.Add: ast.Sub,
        ast.Sub: ast.Add,
        ast.Mult: ast.Div,
        ast.Div: ast.Mult,
        ast.And: ast.Or,
        ast.Or: ast.And,
    },
}


@dataclass(frozen=True)
class Mutant:
    """A statement of a function, and which of its nodes changes."""

    tests: str
    statement: str  # as ``ast.unparse`` writes it
    number: int  # of the node in the statement's walk
    changed: str


def statements(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int, ast.stmt]]:
    """Simple statements of functions, with the list and place where each stands."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            found = getattr(node, name, None)
            for place, statement in enumerate(found if isinstance(found, list) else []):
                if isinstance(
                    statement, ast.Assign | ast.AugAssign | ast.Return | ast.Expr
                ) and not isinstance(node, ast.Module | ast.ClassDef):
                    yield node, name, place, statement


def changed(statement: ast.stmt) -> Iterator[tuple[int, ast.stmt]]:
    """All that one change makes of a statement."""
    for number, node in enumerate(ast.walk(statement)):
        operators = [
            *getattr(node, "ops", []),
            *([node.op] if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) else []),
        ]
        constant = isinstance(node, ast.Constant) and type(node.value) in (int, float)
        if not constant and not any(type(operator) in SWAPPED for operator in operators):
            continue
        other = copy.deepcopy(statement)
        twin = list(ast.walk(other))[number]
        if isinstance(twin, ast.Constant):
            twin.value = twin.value + 1  # type: ignore[operator]
        elif isinstance(twin, ast.Compare):
            twin.ops = (
                [SWAPPED[type(twin.ops[0])](), *twin.ops[1:]] if type(twin.ops[0]) in SWAPPED else twin.ops
            )
        elif isinstance(twin, ast.BinOp | ast.BoolOp | ast.AugAssign):
            twin.op = SWAPPED[type(twin.op)]()  # type: ignore[assignment]
        yield number, other


def mutants(count: int, seed: int) -> list[Mutant]:
    """Some of all that there could be, modules in proportion."""
    found = []
    for module, tests in TESTS.items():
        for *_, statement in statements(
            ast.parse((ROOT / "pipeline_lib" / module).read_text(encoding="utf-8"))
        ):
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                found += [
                    Mutant(tests, ast.unparse(statement), number, ast.unparse(other))
                    for number, other in changed(statement)
                ]
    return random.Random(seed).sample(sorted(set(found), key=repr), count)


def mutate(tree: Path, mutant: Mutant) -> Path | None:
    """Change the one place of a copy of the project where the statement stands; the file, or None."""
    for path in sorted((tree / "pipeline_lib").rglob("*.py")):
        parsed = ast.parse(path.read_text(encoding="utf-8"))
        for node, name, place, statement in statements(parsed):
            if ast.unparse(statement) == mutant.statement:
                getattr(node, name)[place] = dict(changed(statement))[mutant.number]
                path.write_text(ast.unparse(ast.fix_missing_locations(parsed)), encoding="utf-8")
                return path
    return None


def dies(tree: Path, mutant: Mutant, seconds: int) -> bool | None:
    """Whether a test fails, or runs forever; None if the file does not contain the statement.
    Third-party modules are already loaded, because this process forks.
    """
    with tempfile.TemporaryDirectory() as temporary:
        own = Path(temporary) / "tree"
        subprocess.run(["cp", "-r", str(tree), str(own)], check=True)
        if mutate(own, mutant) is None:
            return None
        tests = [str(own / "tests" / f"{name}.py") for name in mutant.tests.split()]
        pid = os.fork()
        if pid == 0:
            import pytest

            os.chdir(own)
            signal.alarm(seconds)
            sys.path[:0] = [str(own), str(own / "tests")]
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]) != 0)
        return os.waitpid(pid, 0)[1] != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="a JSON file that keeps what is found, so that a stopped run goes on"
    )
    asked = parser.parse_args()
    import safetensors.torch  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    done = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out and asked.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        trees = {}
        for name, commit in (("old", asked.old), ("new", "HEAD")):
            if commit:
                trees[name] = Path(temporary) / name
                subprocess.run(
                    ["git", "worktree", "add", "--quiet", "--detach", str(trees[name]), commit],
                    cwd=ROOT,
                    check=True,
                )
        try:
            for mutant in mutants(asked.count, asked.seed):
                key = f"{mutant.statement}  ->  {mutant.changed}"
                if key not in done:
                    done[key] = {name: dies(tree, mutant, 120) for name, tree in trees.items()}
                    if asked.out:
                        asked.out.write_text(json.dumps(done, indent=1), encoding="utf-8")
                print(done[key], key, flush=True)
        finally:
            for tree in trees.values():
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    lost = [key for key, found in done.items() if found.get("old") and found["new"] is False]
    survivors = sum(found["new"] is False for found in done.values())
    print(
        f"{len(done)} mutants: {survivors} survive; {len(lost)} died at {asked.old or 'no other commit'} and"
        " survive here",
        *lost,
        sep="\n",
    )
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
