"""Hostile and damaged inputs: first a table of named cases of each kind, then random ones. A stage
either accepts an input, or refuses it in one line.
"""

import bz2
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import campaign
import pyarrow as pa
import pyarrow.parquet as pq
from campaign import (
    COMMANDS,
    FILE_SIZE,
    LIMIT,
    VARIANTS,
    Ended,
    Fault,
    Ground,
    Kind,
    Tally,
    Tried,
    fork,
    judge,
    snapshot,
    stage,
    tail,
)
from project import change_json, change_params, environment, read_params, text, write_params
from safetensors.torch import load_file, save_file

Change = Callable[[Path], object]  # of a project's directory; what it gives is printed
# sound or refused; undisturbed bytes or refused; undisturbed bytes; refused
Expect = Literal["any", "equal", "same", "refused"]
MODEL, WEIGHTS, CALIBRATION = Path("data/model"), Path("data/model/model.safetensors"), "texts.calibration"
WEIGHTS_FILE = "model.bitmask.safetensors"
# fmt: off
ODD: list[Any] = [
    None, True, False, "", "word", "²", "../x", "/etc/passwd", "a\0b", "x" * 5000, -1, 0, 1, 0.5, -0.0, 1e308,
    [], {}, [None], float("nan"),
    float("inf"), -float("inf"), 2**31, 2**63, 10**30, {"a": 1}, [1, 2, 3], "1e3", "null",
    json.loads("[" * 60 + "]" * 60),
]
WAYS = ("flip", "flip", "flip", "cut", "blank", "grow", "empty", "delete", "directory", "pipe", "passwd",
"zero", "circle", "null", "swap",
"mutate")
# fmt: on


class Case(NamedTuple):
    name: str
    change: Change
    steps: Sequence[str]
    expect: Expect = "any"
    environ: Mapping[str, str | None] = {}
    slow: bool = False  # may rightly take longer than there is time
    limit: float = LIMIT
    real: bool = False  # in a process of its own


class Fuzz:
    """A kind: named cases first, then random ones."""

    def __init__(
        self, ground: Ground, name: str, named: Sequence[Case], drawn: Callable[[random.Random], Case]
    ) -> None:
        self.name, self.named, self._ground, self._drawn = name, named, ground, drawn

    def attempt(self, number: int, draw: random.Random, place: Path) -> Tried:
        case = self.named[number] if number < len(self.named) else self._drawn(draw)
        said = case.change(self._ground.copy(place))
        faults: list[Fault] = []
        before = None
        for command in case.steps:
            ended, found, before = run_step(self._ground, place, command, case, before)
            faults += [Fault(oracle, f"{command}: {what}") for oracle, what in found]
            if ended.code != 0 or found:
                break
        return Tried(
            f"{case.name} {said if isinstance(said, str) else ''}".strip(),
            faults + campaign.orphans(place, 1),
        )


def run_step(
    ground: Ground, place: Path, command: str, case: Case, before: Mapping[str, str] | None = None
) -> tuple[Ended, list[Fault], dict[str, str]]:
    """One command under all oracles, and what lies there afterwards."""
    before = before or snapshot(place, "scratch", "tmp")
    ended = (
        _process(place, command, case) if case.real else fork(stage(place, command, case.environ), case.limit)
    )
    after = snapshot(place, "scratch", "tmp")
    if ended.code is None and case.slow:
        return ended, [], after
    faults = judge(ended)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    changed = {
        path for path in changed if not re.match(r"project/(build/costs/|\.dvc/tmp/sparseline-bug)", path)
    }
    own = {path for path in changed if _of(path, command)} if ended.code == 0 else set[str]()
    faults += [
        Fault("lost", f"{path} changed, with exit code {ended.code}\n{tail(ended.output)}")
        for path in sorted(changed - own)[:3]
    ]
    if ended.code == 0:
        faults += _right(ground, place, command, case.expect, ended, after, own)
    elif ended.code == 2 and case.expect == "same":
        faults.append(Fault("wrong", f"refused: {tail(ended.output)}"))
    left = campaign.remains(place)
    return (
        ended,
        faults
        + [fault for fault in left if ended.code == 0 or re.search(r"\.(partial|lock)(/|$)", fault.what)],
        after,
    )


def _process(place: Path, command: str, case: Case) -> Ended:
    changed = environment(place / "project") | {"TMPDIR": str(place / "tmp")} | dict(case.environ)
    name, *arguments = command.split(" ")
    done = subprocess.run(
        ["python", "-m", f"stages.{name}", *arguments],
        cwd=place / "project",
        env={key: value for key, value in changed.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    return Ended(done.returncode, done.stdout.decode("utf-8", errors="replace"))


def _of(path: str, command: str) -> bool:
    """Whether a path of a case's place is where the command writes."""
    if command.startswith("unpack "):
        out = os.path.normpath(f"project/{command.split(' ')[2]}")
        return path.startswith(f"{out}/")
    return path.startswith("project/") and campaign.belongs(path.removeprefix("project/"), command)


def _right(
    ground: Ground,
    place: Path,
    command: str,
    expect: Expect,
    ended: Ended,
    after: Mapping[str, str],
    own: set[str],
) -> list[Fault]:
    if expect == "refused":
        return [Fault("wrong", f"accepted\n{tail(ended.output)}")]
    if expect == "any":
        said = [campaign.unsound(place / path) for path in sorted(own) if (place / path).exists()]
        return [Fault("wrong", what) for what in said if what][:1]
    if command.startswith("load "):
        variant = "quantised" if "quantised" in command else "sparseline"
        return (
            []
            if reference(ground, f"load ../{variant}")[""] in ended.output
            else [Fault("wrong", "another model was loaded")]
        )
    if command.startswith("unpack "):
        variant = "quantised" if "quantised" in command else "sparseline"
        expected, prefix = (
            reference(ground, f"unpack ../{variant} ../out"),
            os.path.normpath(f"project/{command.split(' ')[2]}") + "/",
        )
    else:
        expected, prefix = (
            {path: digest for path, digest in ground.undisturbed.items() if campaign.belongs(path, command)},
            "project/",
        )
    found = {
        path.removeprefix(prefix): digest
        for path, digest in after.items()
        if path.startswith(prefix) and _of(path, command)
    }
    found = {path: digest for path, digest in found.items() if not path.startswith("build/costs/")}
    differ = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
    return (
        [
            Fault(
                "wrong",
                f"{len(differ)} outputs differ from the undisturbed ones: {differ[:3]}\n{tail(ended.output)}",
            )
        ]
        if differ
        else []
    )


_references: dict[str, dict[str, str]] = {}


def reference(ground: Ground, command: str) -> dict[str, str]:
    """What a bitmask checkpoint is unpacked to, or the digest of what was loaded."""
    if command not in _references:
        place = ground.home / f"reference-{len(_references)}"
        bitmask(ground.copy(place))
        ended = fork(stage(place, command))
        assert ended.code == 0, ended.output
        _references[command] = (
            snapshot(place / "out")
            if (place / "out").exists()
            else {"": re.findall(r"digest \w{64}", ended.output)[0]}
        )
        shutil.rmtree(place)
    return _references[command]


# Damage


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replaced(path: Path, by: str | bytes | Path | Literal[0, 1] | None) -> None:
    """In a path's place: bytes or text, a link to a path, nothing (None), a directory (0) or a
    named pipe (1).
    """
    if any(parent.exists() and not parent.is_dir() for parent in path.parents):  # it is damaged itself by now
        return
    clear(path)
    if isinstance(by, Path):
        path.symlink_to(by)
    elif isinstance(by, str | bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(by.encode("utf-8", errors="surrogatepass") if isinstance(by, str) else by)
    elif by is not None:
        os.mkfifo(path) if by else path.mkdir()


def damage(path: Path, draw: random.Random, others: Sequence[Path] = (), ways: Sequence[str] = WAYS) -> str:
    """One of many ways; the description."""
    way, data = draw.choice(ways), path.read_bytes() if path.is_file() else b""
    at = draw.randrange(min(len(data), 2000) if draw.random() < 0.5 else len(data)) if data else 0
    special: dict[str, Any] = {
        "delete": None,
        "directory": 0,
        "pipe": 1,
        "passwd": Path("/etc/passwd"),
        "zero": Path("/dev/zero"),
    }
    special |= {
        "circle": Path(path.name),
        "null": "null",
        "empty": b"",
        "cut": data[:at],
        "grow": data + draw.randbytes(9),
    }
    special |= {
        "flip": data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :] if data else b"x"
    }
    special |= {
        "blank": data[:at] + bytes(16) + data[at + 16 :],
        "swap": draw.choice(others).read_bytes() if others else b"{}",
    }
    if way == "mutate":
        with suppress(ValueError):
            value = [json.loads(data)]
            said = mutate(value, draw)
            replaced(path, json.dumps(value[0] if value else None, allow_nan=True))
            return f"{path.name}: {said}"
        way = "flip"
    replaced(path, special[way])
    return f"{path.name}: {way} at {at}"


def mutate(value: Any, draw: random.Random) -> str:
    """Change something within lists and objects; the description."""
    spots = [(value, key) for key in (value.keys() if isinstance(value, dict) else range(len(value)))]
    for container, key in spots:  # grows on the way
        below = container[key]
        if isinstance(below, dict | list):
            spots += [
                (below, inner) for inner in (below.keys() if isinstance(below, dict) else range(len(below)))
            ]
    if not spots:
        return "nothing to change"
    container, key = draw.choice(spots)
    way = draw.choice(["set", "set", "set", "delete", "add", "exchange"])
    odd = draw.choice(ODD)
    if way == "delete":
        del container[key]
    elif way == "add" and isinstance(container, dict):
        container[draw.choice(["extra", "", "²", "a.b", "path"])] = odd
    elif way == "exchange":
        other, place = draw.choice(spots)
        container[key], other[place] = json.loads(json.dumps([other[place], container[key]]))
    else:
        container[key] = odd
    return f"{way} {key!r} {str(odd)[:40]!r}"


def both(*changes: Change) -> Change:
    return lambda project: " ".join(
        str(said) for said in [change(project) for change in changes] if isinstance(said, str)
    )


def put(name: str | Path, by: Any) -> Change:
    return lambda project: replaced(project / name, by)


def nothing(_project: Path) -> None:
    pass


# Parameters

KEYS_FIRST = (
    "calibrate",
    "scale",
    "sensitivity",
    "curves sparseline",
    "allocate sparseline",
    "induce sparseline",
    "prune sparseline",
    "plan",
)
BOMB = "".join(
    f"b{level}: &b{level} [{', '.join([f'*b{level - 1}'] * 9) if level else 'x'}]\n" for level in range(12)
)
RAW: dict[str, str | bytes] = {
    "nothing": "", "null": "null", "a list": "[]", "a word": "word", "no YAML": "a: [", "a tab": "a:\n\t- b",
    "alias bomb": BOMB,
    "deep": "a: " + "[" * 20000 + "]" * 20000,
    "an object": "a: !!python/object/apply:os.system ['touch ../outside/x']", "NUL": "a: \0",
    "two documents": "a: 1\n---\nb: 2", "itself": "a: &a [*a]", "a long number": f"a: {'9' * 6000}",
    "latin": b"a: \xff\xfe",
    "set": "? a\n? b",
}  # fmt: skip
SET: dict[str, Sequence[Any]] = {
    "model.include": [None, [None], "**", ["re:(a+)+$"], ["re:["], [""], ["[" * 5000], [["*"]]],
    "model.path": [None, "", "/", "/dev/zero", "data/model/config.json", "a\0b", 3, "../outside"],
    "variants": [None, {}, [], {"": {}}, {"..": {}}, {"a/b": {}}, {"dense": {}}, {1: {}}, {None: {}},
    {"wanda": {"induce": {"steps": None}}}],
    "prune.selection.sparsity": [float("nan"), float("inf"), "0.5", True, 1, 1 - 1e-16, 1e-300, [0.5]],
    "prune.selection.pattern": ["0:4", "4:4", "-1:4", f"2:{10**30}", "²:4", "2:4:8", 2.4, None],
    "prune.quantization": [None, {"bits": True}, {"bits": 2.0}, {"group": 10**30}],
    "prune.batch_rows": [2**63, 10**30, True, 1.0, -1],
    "curves.densities": [[], [0.5, 0.5], [float("nan")], [0, 1], [1e-300], 0.5, [[0.5]]],
    "texts": [None, {}, [], {"calibration": None}],
    "texts.calibration.length": [2**63, 10**30, 0, 1, -1, 2**40], "texts.calibration.rows": [2**63, 0, -5],
    "texts.calibration.seed": [2**64, -1],
    "report.baseline": [None, "none", ["wanda"], "dense"], "sensitivity.seed": [2**64, -1, 2**63],
    "induce.rate": [1e308, float("nan"), 0],
    "induce.temperature": [0, 1e-320, float("inf")], "scale.limit": [1e308, 1e-308],
    "evaluate.completions": [None, {}, {"count": 10**30}],
    "allocate": [None, 1], "presets": [None, {}, {"embedded": None}], "scale.power": [1e308, -1e308],
}  # fmt: skip


def _params_cases() -> list[Case]:
    cases = [
        Case(f"params.yaml: {name}", put("params.yaml", raw), ("keys",), "refused")
        for name, raw in RAW.items()
    ]
    cases += [
        Case(f"params.yaml and {name}", partial(_append, raw), ("keys", "prune wanda"))
        for name, raw in RAW.items()
    ]
    cases += [Case("params.yaml is a pipe", put("params.yaml", 1), ("keys",), "refused")]
    for key, values in SET.items():
        for value in values:
            steps = ("keys", "prepare", "text calibration", "curves sparseline", "prune sparseline", "report")
            cases.append(Case(f"{key} = {str(value)[:30]}", partial(_set, key, value), steps, slow=True))
            cases.append(
                Case(
                    f"{key} = {str(value)[:30]}, by hand",
                    partial(_set, key, value),
                    ("induce sparseline",),
                    slow=True,
                )
            )
    return cases


def _set(key: str, value: Any, project: Path) -> None:
    with suppress(KeyError):
        change_params(project, key, value)


def _append(raw: str | bytes, project: Path) -> None:
    with (project / "params.yaml").open("ab") as file:
        file.write(b"\n" + (raw if isinstance(raw, bytes) else raw.encode()))


def _params(draw: random.Random) -> Case:
    def change(project: Path) -> str:
        values = [read_params(project)]
        said = [mutate(values, draw) for _ in range(draw.choice([1, 1, 2, 5]))]
        if values and isinstance(values[0], dict):
            with suppress(Exception):  # what YAML cannot hold
                write_params(project, values[0])
        return f"{'; '.join(said)}"

    step = draw.choice((*COMMANDS, *KEYS_FIRST))
    return Case(f"random, {step}", change, ("keys", step) if draw.random() < 0.5 else (step,), slow=True)


# Texts

COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def _lines(count: int = 40) -> list[str]:
    return [text(seed, 40) for seed in range(count)]


def _corpus(suffix: str) -> bytes:
    records = [
        {
            "text": line,
            "messages": [{"role": "user", "content": line}, {"role": "assistant", "content": "yes"}],
        }
        for line in _lines()
    ]
    if suffix == ".txt":
        return "\n".join(_lines()).encode()
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), file := io.BytesIO())
        return file.getvalue()
    return (json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records))).encode()


def _texts(content: Mapping[str, Any], **params: Any) -> Change:
    """A directory of texts as the calibration text."""

    def change(project: Path) -> None:
        (project / "data/many").mkdir()
        for name, by in content.items():
            replaced(project / "data/many" / name, by)
        for key, value in ({"path": "data/many"} | params).items():
            change_params(project, f"{CALIBRATION}.{key}", value)

    return change


@cache
def _bomb(compress: Callable[[bytes], bytes], inner: bytes) -> bytes:
    return compress(inner * 5_000_000) * 100


def _template(template: str) -> Change:
    chat = _texts({"a.jsonl": _corpus(".jsonl")}, field="messages", chat_template=True)
    config = "data/model/tokenizer_config.json"
    return both(
        chat, lambda project: change_json(project / config, lambda old: old | {"chat_template": template})
    )


def _text_cases() -> list[Case]:
    good, line = _corpus(".txt"), b'{"text": "%s"}\n'
    plain: dict[str, dict[str, Any]] = {
        "bad UTF-8": {"a.txt": b"\xff\xfe abc \x80" * 900},
        "UTF-16": {"a.txt": good.decode().encode("utf-16")},
        "NUL": {"a.txt": b"\0" * 9000},
        "nothing": {"a.txt": b""}, "no file": {}, "blank": {"a.txt": b" \n" * 9000},
        "a bomb": {"a.txt.gz": _bomb(gzip.compress,
        b"ab " * 10)},
        "xz bomb": {"a.txt.xz": _bomb(lzma.compress, b"ab ")},
        "bz2 bomb": {"a.txt.bz2": _bomb(bz2.compress, b"ab ")},
        "a link out": {"a.txt": good, "b.txt": Path("../../../outside/sentinel")},
        "a link to /dev/zero": {"a.txt": Path("/dev/zero")},
        "a link to passwd": {"a.txt": good, "b.txt": Path("/etc/passwd")}, "a pipe": {"a.txt": good,
        "b.txt": 1},
        "a directory": {"a.txt": 0, "b": good},
        "a circle": {"a.txt": Path("a.txt")}, "a link up": {"a.txt": good, "sub": Path("..")},
        "/proc": {"a": Path("/proc/kmsg"),
        "b.txt": good},
        "no gz": {"a.txt.gz": b"no"}, "a cut gz": {"a.txt.gz": gzip.compress(good)[:-20]},
        "a word": {"a.txt": b"a" * 10_000_000},
        "bad zst": {"a.zst": b"x"},
    }  # fmt: skip
    records: dict[str, dict[str, Any]] = {
        "a broken line": {"a.jsonl": line % b"a" + b'{"text": \n'}, "NaN": {"a.jsonl": b'{"text": NaN}\n'},
        "scalars": {"a.jsonl": b"1\n2\n"},
        "deep": {"a.jsonl": b"[" * 200_000}, "deep json": {"a.json": b'{"text":' * 100_000},
        "a surrogate": {"a.jsonl": b'{"text": "\\ud800"}\n' * 900},
        "a long number": {"a.jsonl": b'{"text": "a", "n": ' + b"9" * 6000 + b"}\n"},
        "null": {"a.json": b"null"},
        "jsonl bomb": {"a.jsonl.gz": _bomb(gzip.compress, b'{"text": "ab cd"}\n')},
        "no parquet": {"a.parquet": b"PAR1PAR1"}, "a cut parquet": {"a.parquet": _corpus(".parquet")[:-30]},
        "json lines of bytes": {"a.jsonl": b'{"text": "\xff"}'},
        "one key twice": {"a.jsonl": b'{"text": "a", "text": null}'},
        "a BOM": {"a.jsonl": b"\xef\xbb\xbf" + _corpus(".jsonl")},
        "a link": {"a.jsonl": Path("/dev/random")},
    }  # fmt: skip
    cases = [Case(f"text: {name}", _texts(content), ("text calibration",)) for name, content in plain.items()]
    cases += [
        Case(f"records: {name}", _texts(content, field="text"), ("text calibration",))
        for name, content in records.items()
    ]
    globs: list[Any] = [
        "../*",
        "/etc/*",
        "**/" * 50 + "*",
        "[",
        "",
        "\0",
        "a" * 5000,
        ["*"],
        "*.none",
        "**",
        "..",
    ]
    cases += [
        Case(f"glob {str(glob)[:20]}", _texts({"a.txt": good}, glob=glob), ("text calibration",))
        for glob in globs
    ]
    paths = [
        "/dev/zero",
        "/proc/self/mem",
        "../outside/sentinel",
        "a\0b",
        "",
        "/",
        "data/texts/none.txt",
        "/proc/self/fd/0",
    ]
    cases += [
        Case(f"path {path}", partial(_set, f"{CALIBRATION}.path", path), ("text calibration",))
        for path in paths
    ]
    fields = ["", ".", "text.x", "text..x", "messages", "messages.0", "a" * 9000, "²"]
    cases += [
        Case(f"field {field[:9]}", _texts({"a.jsonl": _corpus(".jsonl")}, field=field), ("text calibration",))
        for field in fields
    ]
    templates = [
        "{% for i in range(10**9) %}a{% endfor %}",
        "{{ 'a' * 10**11 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1/0 }}",
        "{{",
        "",
    ]
    templates += [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages }}",
        "{{ raise_exception('no') }}",
        "{{ x.y.z }}",
        "{{ '\\ud800' }}",
        "{{ 10**10**8 }}",
    ]
    cases += [Case(f"template {one}", _template(one), ("prepare", "text calibration")) for one in templates]
    return [case._replace(limit=40) for case in cases]


def _text(draw: random.Random) -> Case:
    suffix, squeezed = draw.choice([".txt", ".jsonl", ".json", ".parquet"]), draw.choice(list(COMPRESSED))
    field = None if suffix == ".txt" else draw.choice(["text", "text", "text", "messages", "no.such"])
    name = f"a{suffix}{squeezed}"
    raw, inner = _corpus(suffix), draw.random() < 0.5

    def change(project: Path) -> str:
        _texts({name: raw}, field=field, chat_template=draw.random() < 0.1)(project)
        path = project / "data/many" / name
        said = damage(path, draw) if inner else ""
        if path.is_file():
            replaced(
                path, COMPRESSED[squeezed](path.read_bytes()[: 10**7]) if path.resolve() == path else None
            )
        return said or damage(path, draw)

    return Case(f"random {name} {field}", change, ("text calibration",), limit=40)


# Models

CHAIN = (
    "prepare",
    "text calibration",
    "text validation",
    "text test",
    "calibrate",
    "allocate wanda",
    "induce wanda",
    "prune wanda",
    "evaluate wanda",
)
CONFIG: dict[str, Sequence[Any]] = {
    "num_hidden_layers": [10_000_000, 2**63, -1, 0, None, "two", 1.5, True], "hidden_size": [None, 0, -32,
    2**40, "x", 31, 1e308,
    float("nan")],
    "vocab_size": [None, 0, 2**40, -1, 10, "x"], "rms_norm_eps": [None, "x", float("nan"), -1, 1e308],
    "rope_theta": [None, 0, "x",
    float("inf")],
    "rope_scaling": [3, {"type": "x"}, {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 0}],
    "intermediate_size": [None, 0, 2**40,
    "48"],
    "rope_parameters": [None, 3, {}, {"rope_type": None}, {"rope_theta": float("nan"),
    "rope_type": "default"}],
    "max_position_embeddings": [None, 0, -1, 2**63, "x"], "dtype": ["float128", 3, None, "auto", "int8"],
    "torch_dtype": ["float16", {},
    "x"],
    "tie_word_embeddings": ["maybe", None, 1, True], "architectures": [None, [], [3], "LlamaForCausalLM",
    ["x" * 9000]],
    "model_type": [None, "", 3, "../x"],
    "auto_map": [{"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, 3, None],
    "head_dim": [None, 0, 2**40, 7, "8"],
    "num_attention_heads": [0, None, 3, 2**40, "4"], "num_key_value_heads": [0, None, 3, -2, 2**40],
    "eos_token_id": [None, -1, 10**9, "x",
    [0, "x"]],
    "hidden_act": [None, "__import__", 3, "nope"], "quantization_config": [{}, 3, {"quant_method": "x"}],
    "_attn_implementation": ["x", 3],
    "transformers_version": [3, None], "attention_bias": ["no", None, 3], "pretraining_tp": [0, 7, "x"],
    "attention_dropout": [2,
    float("nan"), "x"],
    "use_cache": ["x"], "text_config": [{}, 3], "id2label": [3, {"a": 3}], "num_labels": [-1, 10**9, "x"],
    "_name_or_path": ["/etc/passwd",
    3],
    "layer_types": [["x"], 3, []], "dict": [3], "to_dict": [None], "problem_type": ["x"],
    "transformers_weights": ["../x", 3],
}  # fmt: skip
OWN = (
    "import pathlib\npathlib.Path('../outside/ran').write_text('x')\nclass Config: pass\nclass Model: pass\n"
)
WHOLE = [
    "null",
    "[]",
    '"x"',
    "",
    "{",
    "{}",
    "NaN",
    "[" * 100_000,
    b"\xff\xfe",
    "\ufeff{}",
    0,
    1,
    Path("/etc/passwd"),
    Path("/dev/zero"),
    None,
]
SETTINGS: dict[str, Sequence[Mapping[str, Any]]] = {
    "generation_config.json": [{"eos_token_id": "x"}, {"max_length": -1}, {"temperature": float("nan")},
    {"transformers_version": 3},
    {"do_sample": "x"},
                               {"eos_token_id": 10**30}, {"pad_token_id": [1]}, {"cache_implementation": 3},
                               {"num_beams": -1},
                               {"max_new_tokens": None}],
    "tokenizer_config.json": [{"tokenizer_class": "Evil"}, {"tokenizer_class": 3},
    {"auto_map": {"AutoTokenizer": ["own.T", None]}},
    {"chat_template": 3},
                              {"model_max_length": -1}, {"model_max_length": float("nan")}, {"bos_token": {}},
                              {"eos_token": 3},
                              {"added_tokens_decoder": 3},
                              {"added_tokens_decoder": {"99999999": {"content": "x"}}},
                              {"clean_up_tokenization_spaces": "x"},
                              {"padding_side": "x"}],
    "tokenizer.json": [{"model": None}, {"added_tokens": None}, {"pre_tokenizer": None}, {"normalizer": 3},
    {"decoder": {"type": "x"}},
    {"truncation": 3},
                       {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a*)*b"},
                       "behavior": "Isolated", "invert": False}}],
}  # fmt: skip
HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "negative offsets": lambda header: header["lm_head.weight"].update(data_offsets=[-8, 0]),
    "offsets beyond": lambda header: header["lm_head.weight"].update(data_offsets=[0, 2**62]),
    "offsets of floats": lambda header: header["lm_head.weight"].update(data_offsets=[0.5, 1.5]),
    "a huge shape": lambda header: header["lm_head.weight"].update(shape=[2**31, 2**31]),
    "a shape of zeros": lambda header: header["lm_head.weight"].update(shape=[0, 2**62], data_offsets=[0, 0]),
    "a negative shape": lambda header: header["lm_head.weight"].update(shape=[-1, -1]),
    "no shape": lambda header: header["lm_head.weight"].pop("shape"),
    "dtype F99": lambda header: header["lm_head.weight"].update(dtype="F99"),
    "dtype BOOL": lambda header: header["lm_head.weight"].update(dtype="BOOL"),
    "dtype I32": lambda header: header["lm_head.weight"].update(dtype="I32"),
    "a null": lambda header: header.update({"lm_head.weight": None}),
    "metadata of numbers": lambda header: header.update(__metadata__={"a": 3}),
    "metadata of null": lambda header: header.update(__metadata__=None),
    "a million tensors": lambda header: header.update(
        {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(10**6)}
    ),
    "nothing": lambda header: header.clear(),
    "an odd name": lambda header: header.update({"../../outside/x": header.pop("lm_head.weight")}),
}


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def joined(header: Any, data: bytes) -> bytes:
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", errors="surrogatepass"
    )
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + data


def _header(change: Callable[[dict[str, Any]], object], project: Path) -> str:
    header, data = split(project / WEIGHTS)
    said = change(header)
    replaced(project / WEIGHTS, joined(header, data))
    return str(said or "")


def _fill(name: str, value: float, at: Any, project: Path) -> None:
    tensors = load_file(project / WEIGHTS)
    tensors[name][at] = value
    save_file(tensors, project / WEIGHTS, metadata={"format": "pt"})


def _index(target: str | None, project: Path) -> None:
    """Weights in files that an index names."""
    names = list(load_file(project / WEIGHTS))
    (project / WEIGHTS).rename(project / MODEL / "model-00001-of-00001.safetensors")
    placed = dict.fromkeys(names, "model-00001-of-00001.safetensors") | {names[0]: target}
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    replaced(project / MODEL / "model.safetensors.index.json", json.dumps(index))


def _model_cases() -> list[Case]:
    def update(name: str, values: Mapping[str, Any]) -> Change:
        return both(
            lambda project: change_json(project / MODEL / name, lambda old: old | values),
            put(MODEL / "own.py", OWN) if "auto_map" in values else nothing,
        )

    cases = [
        Case(f"config.json: {key} = {str(value)[:40]}", update("config.json", {key: value}), CHAIN)
        for key, values in CONFIG.items()
        for value in values
    ]
    for name, settings in SETTINGS.items():
        cases += [Case(f"{name}: {str(values)[:60]}", update(name, values), CHAIN) for values in settings]
    for name in ("config.json", *SETTINGS, "model.safetensors"):
        cases += [Case(f"{name} is {str(by)[:20]!r}", put(MODEL / name, by), CHAIN) for by in WHOLE]
    for name in (
        "LICENSE",
        "extra.json",
        "additional_chat_templates/x.jinja",
        "tokenizer.model",
        "special_tokens_map.json",
        "vocab.json",
        "chat_template.jinja",
    ):
        cases += [
            Case(f"{name} is {str(by)[:20]!r}", put(MODEL / name, by), CHAIN)
            for by in (b"\xff", Path("/etc/passwd"), Path("gone"))
            if "/" not in name or by == b"\xff"
        ]
    cases += [
        Case(f"{name} comes", put(MODEL / name, b"x"), CHAIN)
        for name in ("pytorch_model.bin", "model.bin", "a/model.safetensors", "adapter_model.safetensors")
    ]
    cases += [Case(f"header: {name}", partial(_header, change), CHAIN) for name, change in HEADERS.items()]
    cases += [
        Case(f"a header of {size} bytes", put(WEIGHTS, size.to_bytes(8, "little") + b"{}"), CHAIN, "refused")
        for size in (0, 1, 2**40, 2**63, 2**64 - 1)
    ]
    matrix = "model.layers.1.mlp.up_proj.weight"
    cases += [Case(f"{name}: {value}", partial(_fill, name, value, at), CHAIN)
              for name in (matrix, "model.norm.weight", "model.embed_tokens.weight",
              "model.layers.0.input_layernorm.weight")
              for value in (float("nan"), float("inf"), 0.0, 1e-40, 3e38) for at in (0,
              slice(None))]  # fmt: skip
    targets = [
        "../x.safetensors",
        "/etc/passwd",
        "../../../outside/sentinel",
        "",
        ".",
        "config.json",
        "gone.safetensors",
        None,
    ]
    cases += [Case(f"index names {target}", partial(_index, target), CHAIN, "refused") for target in targets]
    return cases


def _model(draw: random.Random) -> Case:
    def change(project: Path) -> str:
        paths = sorted((project / MODEL).iterdir())
        said = []
        for _ in range(draw.choice([1, 1, 2])):
            path = draw.choice(paths)
            if path.name == WEIGHTS.name and draw.random() < 0.5 and path.is_file():
                with suppress(ValueError):
                    said.append(_header(lambda header: mutate(header, draw), project))
            else:
                said.append(
                    damage(path, draw, [one for one in paths if one.is_file()], (*WAYS, *["mutate"] * 12))
                )
        return "; ".join(said)

    return Case("random", change, CHAIN)


# Artifacts

READERS: dict[str, Sequence[str]] = {
    "prepare": ("text calibration", "calibrate", "scale", "sensitivity", "curves", "allocate", "induce",
    "prune", "distil", "evaluate",
    "evaluate dense", "tasks dense", "export", "report"),
    "texts": ("calibrate", "sensitivity", "curves", "induce", "prune", "distil", "evaluate", "evaluate dense",
    "report"), "calibrate": ("scale",
    "curves", "induce"),
    "scale": ("induce",), "sensitivity": ("curves", "allocate", "report"), "curves": ("allocate",),
    "allocate": ("induce", "prune",
    "report"),
    "induce": ("prune",), "prune": ("distil", "evaluate", "tasks", "export"), "distil": ("evaluate",
    "tasks", "export"),
    "training": ("export", "report"), "facts": ("export", "report"), "evaluate": ("export", "choose",
    "report"),
    "completions": ("report",), "tasks": ("export", "report"), "sizes": ("report",), "choice.json": ("report",
    ), "keys": ("report", "prune"),
    "export": ("keys", "export"),
}  # fmt: skip


def _artifact(draw: random.Random) -> Case:
    top, variant = draw.choice(sorted(READERS)), draw.choice(sorted(VARIANTS))
    step = draw.choice(READERS[top])
    step += (
        ""
        if " " in step or step in ("calibrate", "scale", "sensitivity", "report", "choose", "keys")
        else f" {variant}"
    )

    def change(project: Path) -> str:
        files = [path for path in sorted(project.joinpath("build", top).rglob("*")) if path.is_file()] or [
            project / "build" / top
        ]
        own = [path for path in files if variant in str(path.relative_to(project))]
        path = draw.choice(own if own and draw.random() < 0.7 else files)
        return damage(
            path,
            draw,
            [one for one in files if one.suffix == path.suffix],
            [way for way in WAYS if way != "delete" or step not in ("report", "choose")],
        )

    return Case(f"random build/{top}, {step}", change, (step,), "equal")


# Scratch

RESUMED = ("prune wanda", "prune sparseline", "prune quantised", "induce sparseline", "induce quantised")
STREAMS = {"SPARSELINE_ACTIVATION_BYTES": "0"}


def interrupted(ground: Ground, command: str, blocks: int) -> Path:
    """The scratch directory of a stage that was killed as soon as so many blocks were finished."""
    place = ground.home / f"interrupted-{command.replace(' ', '-')}-{blocks}"
    if not place.exists():
        ground.copy(place)

        def work() -> None:
            from pipeline_lib.core.kept import Kept

            finish, count = Kept.finish, iter(range(blocks - 1, -1, -1))

            def told(self: Any, *arguments: Any, **named: Any) -> None:
                finish(self, *arguments, **named)
                if not next(count):
                    os.kill(os.getpid(), signal.SIGKILL)

            Kept.finish = told  # type: ignore[method-assign]
            stage(place, command, STREAMS)()

        ended = fork(work)
        assert ended.code == -signal.SIGKILL, ended.output
    return place / "scratch"


def _scratch(ground: Ground, draw: random.Random, undamaged: str = "") -> Case:
    command, blocks = undamaged or draw.choice(RESUMED), draw.randint(1, 3)

    def change(project: Path) -> str:
        scratch = Path(shutil.copytree(interrupted(ground, command, blocks), project.parent / "scratch"))
        if undamaged:
            return ""
        paths = [
            path
            for path in sorted(scratch.rglob("*"))
            if path.suffix != ".lock" and len(path.relative_to(scratch).parts) > 1
        ]
        files = [path for path in paths if path.is_file()]
        said = []
        for _ in range(draw.choice([1, 1, 1, 2, 4])):
            path = draw.choice(files if draw.random() < 0.8 else paths)
            others = [one for one in files if one.is_file() and one.suffix == path.suffix]
            said.append(damage(path, draw, others) if path.parent.is_dir() else "")
        if draw.random() < 0.2:
            path = draw.choice(paths)
            replaced(path, Path("../../../outside"))
            said.append(f"{path.name}: a link out")
        return "; ".join(said)

    return Case(f"{command} after {blocks} blocks", change, (command,), "same", STREAMS)


# Bitmask directories


def bitmask(project: Path) -> None:
    for variant in ("sparseline", "quantised"):
        shutil.copytree(project / "build/export" / variant / "bitmask", project.parent / variant)


class Forged(NamedTuple):
    manifest: dict[str, Any]
    header: dict[str, Any]
    told: dict[str, Any]

    def tensor(self, key: str) -> dict[str, Any]:
        """Of the first tensor that is stored with this key."""
        return next(facts for facts in self.told["tensors"].values() if key in facts)

    def part(self, suffix: str) -> dict[str, Any]:
        return next(one for name, one in self.header.items() if name.endswith(suffix))

    @property
    def weights(self) -> dict[str, Any]:
        return next(iter(self.manifest["weights"].values()))


def forge(directory: Path, change: Callable[[Forged], object]) -> str:
    """Change what a bitmask checkpoint says of itself, and make its checksums right again."""
    path = directory / WEIGHTS_FILE
    header, data = split(path)
    forged = Forged(
        json.loads((directory / "bitmask.json").read_text(encoding="utf-8")),
        header,
        json.loads(header["__metadata__"]["sparseline"]),
    )
    said = change(forged)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["sparseline"] = json.dumps(forged.told)
    raw = joined(header, data)
    replaced(path, raw)
    with suppress(KeyError, AttributeError, TypeError, StopIteration):
        forged.weights.setdefault("bytes", 0)
        signed = {"bytes": len(raw), "header_sha256": hashlib.sha256(raw[: len(raw) - len(data)]).hexdigest()}
        forged.weights.update({key: value for key, value in signed.items() if key in forged.weights})
    sign(directory, forged.manifest)
    return str(said or "")


def sign(directory: Path, manifest: dict[str, Any]) -> None:
    bare = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(_manifest(bare).encode("utf-8", errors="surrogatepass")).hexdigest()
    replaced(directory / "bitmask.json", _manifest(bare | {"sha256": digest}))


def _manifest(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


FORGED: dict[str, Callable[[Forged], object]] = {
    **{f"dense {name!r}": lambda one, name=name: one.weights.update(dense=name)  # type: ignore[misc]
       for name in ("..", ".", "", "/tmp/x", "../x", "a/b", "config.json", "bitmask.json", "a\0b",
       "a\nb", "x" * 300,
       "model.safetensors.index.json", "\ud800")},
    **{f"file {name!r}": lambda one,
    name=name: one.manifest["files"].update({name: "0" * 64})  # type: ignore[misc]
       for name in ("../outside/sentinel", "/etc/passwd", "..", "", "/dev/zero", "a\0b", "bitmask.json",
       "model.safetensors")},
    **{f"shape {shape}": lambda one,
    shape=shape: one.tensor("shape").update(shape=shape)  # type: ignore[misc]
       for shape in ([2**31, 2**31], [-1, -1], [], [0], [0, 2**62], [2**63], None, "x", [1.5], [10**30],
       [1] * 100)},
    **{f"dtype {dtype}": lambda one,
    dtype=dtype: one.tensor("dtype").update(dtype=dtype)  # type: ignore[misc]
       for dtype in ("F99", None, 3, "U8", "I64", "F64", "BF16", "")},
    **{f"{key} {value}": lambda one, key=key,
    value=value: one.tensor("bits" if "bits" in str(one.told) else "shape").update({key: value})  # type: ignore[misc]
       for key, values in {"group": (0, -1, 2**63, 10**30, None, 1.5), "bits": (0, 1, 9, 3, None),
       "transposed": (True,
       3)}.items() for value in values},
    **{f"part {suffix} {key} {value}": lambda one, suffix=suffix, key=key,
    value=value: one.part(suffix).update({key: value})  # type: ignore[misc]
       for suffix in (".mask", "norm.weight") for key, value in (("shape", [2**62]), ("shape", [-1]),
       ("dtype", "F32"), ("data_offsets",
       [0, 8]), ("data_offsets", [8, 0]), ("data_offsets", None))},
    "no tensors": lambda one: one.told["tensors"].clear(), "no told": lambda one: one.told.clear(),
    "no weights": lambda one: one.manifest["weights"].clear(),
    "no files": lambda one: one.manifest["files"].clear(),
    "version 2": lambda one: one.manifest.update(version=2),
    "indexed": lambda one: one.manifest.update(indexed=True),
    "version true": lambda one: one.manifest.update(version=True),
    "no metadata": lambda one: one.header.pop("__metadata__"),
    "bytes": lambda one: one.weights.update(bytes=10**30),
    "a name out": lambda one: one.manifest["weights"].update({"../x": dict(one.weights)}),
    "twice": lambda one: one.manifest["weights"].update({"config.json": dict(one.weights)}),
    "no bytes": lambda one: one.weights.pop("bytes"),
    "header null": lambda one: one.header.update(lm_head=None),
    "no indexed": lambda one: one.manifest.pop("indexed"),
}  # fmt: skip


def _bitmask_case(name: str, variant: str, change: Callable[[Path], object], expect: Expect) -> Case:
    """``change`` is of the checkpoint's directory."""
    steps = (f"unpack ../{variant} ../out", f"load ../{variant}")
    return Case(
        f"{variant}: {name}",
        both(lambda project: bitmask(project), lambda project: change(project.parent / variant)),
        steps,
        expect,
    )


def _bitmask_cases() -> list[Case]:
    cases = [
        _bitmask_case(name, variant, partial(forge, change=change), "any")
        for name, change in FORGED.items()
        for variant in ("sparseline", "quantised")
    ]
    cases = [case._replace(steps=case.steps[:1]) if number % 4 else case for number, case in enumerate(cases)]
    outs = [
        "../outside",
        "../sparseline",
        "../outside/sentinel",
        "..",
        "/proc/x",
        "/dev/null/x",
        "../sparseline/config.json",
    ]
    cases += [
        Case(f"unpack into {out}", bitmask, (f"unpack ../sparseline {out}",), "refused") for out in outs
    ]
    cases += [
        Case(f"unpack into {out}", bitmask, (f"unpack ../sparseline {out}",), "equal")
        for out in ("../new/deep/out", "../²", "../" + "x" * 300)
    ]
    cases += [
        Case(f"unpack {path}", bitmask, (f"unpack {path} ../out",), "refused")
        for path in ("../outside", "/dev/zero", "data/model", "../gone", "../outside/sentinel")
    ]
    link = both(bitmask, put("../out", Path("outside")))
    return [
        *cases,
        Case("unpack into a link", link, ("unpack ../sparseline ../out",), "refused"),
        Case("unpack", bitmask, ("unpack ../quantised ../out", "load ../quantised"), "same"),
    ]


def _bitmask(draw: random.Random) -> Case:
    variant = draw.choice(["sparseline", "quantised"])

    def forged(one: Forged) -> str:
        return "; ".join(
            mutate(draw.choice([one.manifest, one.header, one.told]), draw)
            for _ in range(draw.choice([1, 1, 2, 3]))
        )

    def damaged(directory: Path) -> str:
        files = sorted(path for path in directory.iterdir() if path.is_file())
        return damage(draw.choice(files), draw, files)

    if draw.random() < 0.5:
        return _bitmask_case("forged", variant, partial(forge, change=forged), "any")
    return _bitmask_case("damaged", variant, damaged, "equal")


# The environment

VARIABLES: dict[str, Sequence[str]] = {
    "SPARSELINE_THREADS": ("0", "-1", "²", "1.5", str(2**31), "5000", "one", " 1", "9" * 30, "١", "1"),
    "SPARSELINE_DEVICE": ("meta", "hpu", "auto", "cuda", "cuda:999", "mps", "", "cpu:0", "CPU", "xla", "²",
    "cpu", "cuda:²"),
    "SPARSELINE_ACTIVATION_BYTES": ("0", "-1", "²", "1e9", str(2**63), "9" * 30, "x"),
    "SPARSELINE_GRAM_BYTES": ("0", "-1", "²",
    str(2**63), "x", "1"), "SPARSELINE_GPU_ACTIVATION_BYTES": ("0", "-1", "x", "9" * 30),
    "SPARSELINE_SCRATCH": ("/proc/x", "/dev/null", "../outside/sentinel", "", ".", "x" * 300, "../new/deep",
    "/etc/passwd/x", "~",
    "/proc/self/fd"),
    "SPARSELINE_CLIENT": ("x", "-1", "0", "²", "1", "9" * 30), "SPARSELINE_PRELOADED": ("/none", "",
    "x" * 300, "/dev/null"),
    "TMPDIR": ("/proc/x", "/none", ""),
    "DVC_STAGE": ("x", ""), "DVC_ROOT": ("/none", ""), "HOME": ("/none", ""), "XDG_CACHE_HOME": ("/proc/x",
    ""), "COLUMNS": ("0", "-1",
    "x"), "TERM": ("", "dumb"),
    "HF_HOME": ("/proc/x",), "OMP_NUM_THREADS": ("x", "0"), "TZ": ("x",), "NO_COLOR": ("1",), "LANG": ("C",
    "tr_TR.UTF-8"),
    "SPARSELINE_UNKNOWN": ("x",),
}  # fmt: skip
SAME_RESULTS = (
    "prune quantised",
    "induce sparseline",
    "prune sparseline",
    "text calibration",
    "evaluate wanda",
    "calibrate",
    "export quantised",
    "report",
    "prepare",
)


def _environment_cases() -> list[Case]:
    def unset(name: str, value: str) -> Mapping[str, str | None]:
        return (
            {name: value, "SPARSELINE_SCRATCH": None}
            if name in ("HOME", "XDG_CACHE_HOME", "DVC_ROOT")
            else {name: value}
        )

    cases = [Case(f"{name}={value[:20]}", nothing, (SAME_RESULTS[at % 3],), "equal", unset(name, value))
             for name, values in VARIABLES.items() for at, value in enumerate(values)]  # fmt: skip
    files = {
        "build/prune": "prune wanda",
        "build/induce": "induce sparseline",
        "build/costs": "prune wanda",
        "report": "report",
        "build/calibrate": "calibrate",
        "build": "keys",
    }
    files |= {
        "build/export": "export sparseline",
        "build/facts": "prune wanda",
        "build/texts": "text calibration",
        "build/evaluate": "evaluate dense",
        "build/keys": "keys",
    }
    cases += [
        Case(f"{path} is {by!r}", put(path, by), (step,), "equal")
        for path, step in files.items()
        for by in (b"x", Path("/proc/1"), Path("/dev/null"), Path("gone"))
    ]
    cases += [
        Case(f"scratch is {by!r}", put("../scratch", by), ("prune wanda",), "refused")
        for by in (b"x", Path("/proc/1"), Path("/dev/null"), 1)
    ]
    language = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for environ in (
        language,
        language | {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict"},
    ):
        cases.append(Case(f"{environ}", nothing, ("report",), "equal", environ, real=True))
        cases.append(
            Case(
                f"{environ}, refused",
                partial(_set, "prune.batch_rows", "²é漢"),
                ("prune wanda",),
                "refused",
                environ,
                real=True,
            )
        )
    cases += [
        Case(f"files of {size} bytes, {step}", nothing, (step,), "equal", {FILE_SIZE: str(size)})
        for size in (0, 10, 5000, 100_000)
        for step in SAME_RESULTS
    ]
    return cases


def _environment(draw: random.Random) -> Case:
    chosen = draw.sample(sorted(VARIABLES), draw.choice([1, 2, 3]))
    environ: dict[str, str | None] = {name: draw.choice(VARIABLES[name]) for name in chosen}
    if draw.random() < 0.3:
        environ[FILE_SIZE] = str(draw.randrange(200_000))
    return Case(f"{environ}", nothing, (draw.choice(SAME_RESULTS),), "equal", environ)


def kinds(ground: Ground) -> list[Kind]:
    undamaged = [_scratch(ground, random.Random(0), command) for command in RESUMED]
    return [
        Fuzz(ground, "fuzz-params", _params_cases(), _params),
        Fuzz(ground, "fuzz-text", _text_cases(), _text),
        Fuzz(ground, "fuzz-model", _model_cases(), _model),
        Fuzz(ground, "fuzz-artifact", [], _artifact),
        Fuzz(ground, "fuzz-scratch", undamaged, partial(_scratch, ground)),
        Fuzz(ground, "fuzz-bitmask", _bitmask_cases(), _bitmask),
        Fuzz(ground, "fuzz-environment", _environment_cases(), _environment),
    ]


# Guided by coverage

GUIDED = ("fuzz-header-atheris", "fuzz-bitmask-atheris")


def guided(ground: Ground, seed: int, seconds: float) -> list[Tally]:
    """Headers and manifests of bitmask checkpoints with right checksums, as libFuzzer makes them
    up; it stops at the first finding.
    """
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (pip install atheris): what coverage guides is left out")
        return []
    tallies = []
    for name in GUIDED:
        place = ground.home / name
        bitmask(ground.copy(place))
        (place / "corpus").mkdir()
        directory = place / "quantised"
        header = (directory / WEIGHTS_FILE).read_bytes()
        text = (
            header[8 : 8 + int.from_bytes(header[:8], "little")]
            if name == GUIDED[0]
            else (directory / "bitmask.json").read_bytes()
        )
        (place / "corpus" / "right").write_bytes(text)
        options = [
            f"-seed={seed or 1}",
            f"-max_total_time={seconds / 2:.0f}",
            "-timeout=20",
            "-rss_limit_mb=10000",
            "-print_final_stats=1",
        ]
        command = [
            sys.executable,
            __file__,
            name,
            str(directory),
            *options,
            f"-artifact_prefix={place}/",
            f"-max_len={2 * len(text)}",
        ]
        done = subprocess.run(
            [*command, str(place / "corpus")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        executed = re.search(r"number_of_executed_units: (\d+)", done.stdout)
        tally = Tally(
            name, seed, tried=int(executed[1]) if executed else 0, tracebacks=int(done.returncode != 0)
        )
        if done.returncode:
            print(f"\nFINDING {name}: tracebacks: {done.stdout[-3000:]}\nagain: --atheris --seed {seed}")
        tallies.append(tally)
    return tallies


def guide(name: str, directory: Path, options: Sequence[str]) -> None:
    """In a process of its own, which ends here."""
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

    for module in [module for module in sys.modules if module.startswith("pipeline_lib.export")]:
        del sys.modules[module]
    with atheris.instrument_imports(include=["pipeline_lib.export"]):
        from pipeline_lib.export import load
    from pipeline_lib.core.errors import SparselineError

    _, body = split(directory / WEIGHTS_FILE)
    manifest = json.loads((directory / "bitmask.json").read_text(encoding="utf-8"))

    def one(data: bytes) -> None:
        if name == GUIDED[0]:
            first = len(data).to_bytes(8, "little") + data
            (directory / WEIGHTS_FILE).write_bytes(first + body)
            manifest["weights"][WEIGHTS_FILE] |= {
                "bytes": len(first + body),
                "header_sha256": hashlib.sha256(first).hexdigest(),
            }
            sign(directory, manifest)
        else:
            (directory / "bitmask.json").write_bytes(data)
            with suppress(ValueError, RecursionError, AttributeError):
                sign(directory, json.loads(data))
        with suppress(SparselineError):
            for _ in load.tensors(directory):
                pass

    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    guide(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
