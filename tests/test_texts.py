"""Texts to rows. Oracles: hand-made documents in every source's own layout, and the protocol spelt
out token by token.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from tiny import END, VOCABULARY, make_tokenizer
from transformers import PreTrainedTokenizerBase

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import check_name, parse, section
from pipeline_lib.models.start import Start, start
from pipeline_lib.models.tokenizer import load_tokenizer
from pipeline_lib.texts.chat import render
from pipeline_lib.texts.rows import encode, rows_of, split
from pipeline_lib.texts.texts import TextParams, read_texts

ROOT = Path(__file__).resolve().parent.parent
LISTS = ("calibration", "validation", "test")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def params(kind: str = "files", path: Path = Path("text.txt"), **changes: Any) -> TextParams:
    values: dict[str, Any] = {
        "use": "calibrate",
        "kind": kind,
        "path": path,
        "name": None,
        "glob": None,
        "field": None,
        "hub": None,
        "revision": None,
        "generated": None,
        "chat_template": False,
        "start": None,
        "packing": "concatenate",
        "rows": 2,
        "length": 4,
        "distinct": 1,
        "held_out": 0.0,
        "training": 0,
        "seed": None,
    }
    return parse(TextParams, {**values, **changes}, "texts.x")


def file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def records(path: Path, values: list[Any]) -> Path:
    return file(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


# The standard library


def test_the_three_lists_exist_and_are_disjoint() -> None:
    """Calibration, validation and test text share no module, Python here has all of them, and the
    model was trained on none.

    Oracle of the last: data/held_out.json, which training left out, has each of them for the same use.
    """
    lists = json.loads((ROOT / "data" / "stdlib.json").read_text())
    assert set(LISTS) <= lists.keys()
    held_out = json.loads((ROOT / "data" / "held_out.json").read_text())
    assert all(set(lists[name]) <= set(held_out[name]) for name in LISTS)
    everything = [module for name in LISTS for module in lists[name]]
    assert len(everything) == len(set(everything)) > 20
    for module in everything:
        assert (Path(sysconfig.get_paths()["stdlib"]) / module).is_file()


@pytest.mark.parametrize("name", LISTS)
def test_stdlib_texts_are_the_modules(name: str) -> None:
    """Oracle: the files' bytes, in the list's order, and their hashes."""
    path = ROOT / "data" / "stdlib.json"
    modules = json.loads(path.read_text())[name]
    raw = [(Path(sysconfig.get_paths()["stdlib"]) / module).read_bytes() for module in modules]
    texts = read_texts(params("stdlib", path, name=name))
    assert texts.documents == [content.decode() for content in raw]
    assert texts.provenance["sha256"] == {
        m: hashlib.sha256(c).hexdigest() for m, c in zip(modules, raw, strict=True)
    }
    assert texts.provenance["kind"] == "stdlib"
    assert texts.provenance["documents"] == len(modules)


def test_stdlib_mistakes_are_told(tmp_path: Path) -> None:
    path = file(tmp_path / "lists.json", '{"mine": ["no_such_module.py"], "none": []}')
    with pytest.raises(SparselineError, match=r"lacks the standard library's no_such_module\.py"):
        read_texts(params("stdlib", path, name="mine"))
    with pytest.raises(SparselineError, match="has no entry 'yours'; it has: mine, none"):
        read_texts(params("stdlib", path, name="yours"))
    with pytest.raises(SparselineError, match="is empty; give a source with at least one non-empty document"):
        read_texts(params("stdlib", path, name="none"))
    with pytest.raises(SparselineError, match="cannot be read as JSON"):
        read_texts(params("stdlib", tmp_path / "absent.json", name="mine"))


def test_the_embedded_text_is_enough() -> None:
    """Oracle: the rows that params.yaml asks for, cut with the embedded tokenizer."""
    tokenizer = load_tokenizer(ROOT / "data" / "tiny-llama", 4096)
    for name, values in section("texts", ROOT / "params.yaml").items():
        asked = parse(TextParams, {**values, "path": ROOT / values["path"]}, f"texts.{name}")
        rows = rows_of(encode(tokenizer, read_texts(asked).documents), asked, start(None, "llama", tokenizer))
        assert rows.shape == (asked.samples, asked.length)


@pytest.mark.parametrize("module", ["../secret.py", "/etc/hostname", "site-packages/torch/__init__.py"])
def test_modules_outside_the_standard_library_are_told(tmp_path: Path, module: str) -> None:
    """DVC would not watch them, and env.lock.json does not name them."""
    path = file(tmp_path / "lists.json", json.dumps({"mine": [module]}))
    with pytest.raises(SparselineError, match="is outside the standard library"):
        read_texts(params("stdlib", path, name="mine"))


@pytest.mark.parametrize("entry", ["csv.py", 5, [5], {"a": "csv.py"}])
def test_a_list_that_is_none_is_told(tmp_path: Path, entry: Any) -> None:
    with pytest.raises(SparselineError, match="must be a list of modules"):
        read_texts(params("stdlib", file(tmp_path / "lists.json", json.dumps({"mine": entry})), name="mine"))


# Files


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    """Byte for byte, line ends and all."""
    texts = read_texts(params(path=file(tmp_path / "a.txt", "one\r\n\ntwo ✓\n")))
    assert texts.documents == ["one\r\n\ntwo ✓\n"]
    assert texts.provenance["sha256"] == {"a.txt": hashlib.sha256("one\r\n\ntwo ✓\n".encode()).hexdigest()}


def test_a_directory_gives_its_files_in_order(tmp_path: Path) -> None:
    """Sorted by path, whatever the order of creation; a glob picks, and may reach into folders."""
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.md"):
        file(tmp_path / name, name)
    assert read_texts(params(path=tmp_path)).documents == ["a.txt", "b.txt", "d.md", "deep/c.txt"]
    assert read_texts(params(path=tmp_path, glob="*.txt")).documents == ["a.txt", "b.txt"]
    assert read_texts(params(path=tmp_path, glob="**/*.txt")).documents == ["a.txt", "b.txt", "deep/c.txt"]
    with pytest.raises(
        SparselineError,
        match=r"No file matches .*\.rst; .* path or glob: it has, for example, a\.txt and b\.txt\.",
    ):
        read_texts(params(path=tmp_path, glob="*.rst"))
    with pytest.raises(SparselineError, match="No file matches"):
        read_texts(params(path=tmp_path / "absent.txt"))


def test_a_path_may_hold_glob_characters(tmp_path: Path) -> None:
    """Brackets in a directory's or file's own name are no pattern."""
    path = file(tmp_path / "run [1]" / "a.txt", "text")
    assert read_texts(params(path=path)).documents == ["text"]
    assert read_texts(params(path=path.parent)).documents == ["text"]


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Provenance names every file that was read."""
    for folder in ("one", "two"):
        file(tmp_path / folder / "a.txt", folder)
    texts = read_texts(params(path=tmp_path))
    assert texts.documents == ["one", "two"]
    hashes = {hashlib.sha256(content.encode()).hexdigest() for content in ("one", "two")}
    assert set(texts.provenance["sha256"].values()) == hashes


def test_jsonl_gives_one_document_a_record(tmp_path: Path) -> None:
    """Blank lines and empty documents are passed over; the record's other fields too."""
    path = tmp_path / "a.jsonl"
    file(path, '{"text": "one", "id": 1}\n\n{"text": "  "}\n{"text": "two\\nlines"}')
    texts = read_texts(params(path=path, field="text"))
    assert texts.documents == ["one", "two\nlines"]
    assert texts.provenance["documents"] == 2


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\u001c"])
def test_unicode_line_separators_do_not_end_a_record(tmp_path: Path, separator: str) -> None:
    """Oracle: RFC 8259 allows U+2028, U+2029 and U+0085 raw inside strings, and web text holds
    them; only \\n ends a record.
    """
    text = f"before{separator}after"
    line = json.dumps({"text": text}, ensure_ascii=separator < " ")
    assert read_texts(
        params(path=file(tmp_path / "a.jsonl", line + "\r\n" + line), field="text")
    ).documents == [text, text]


RECORDS = [{"text": "one", "id": 1}, {"text": " "}, {"text": "two\nlines é", "id": [2]}]


def write_records(path: Path) -> None:
    """RECORDS in the format that the name says; all written by other code than what reads them."""
    inner = path.with_suffix("") if path.suffix.lower() in (".gz", ".bz2", ".xz") else path
    if inner.suffix == ".parquet":
        Dataset.from_list(
            [{"text": record["text"], "id": str(record.get("id"))} for record in RECORDS]
        ).to_parquet(path)
        return
    lines = (
        json.dumps(RECORDS, indent=1) if inner.suffix == ".json" else "\r\n".join(map(json.dumps, RECORDS))
    )
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path.write_bytes(packers.get(path.suffix.lower(), bytes)(lines.encode()))


NAMES = (
    "a.jsonl",
    "a.JSONL",
    "a.ndjson",
    "a.json",
    "a.parquet",
    "a.jsonl.gz",
    "a.json.bz2",
    "a.ndjson.xz",
    "A.JSON.GZ",
)


@pytest.mark.parametrize("name", NAMES)
def test_records_are_read_in_every_format(tmp_path: Path, name: str) -> None:
    """The same documents in the same order, the empty one counted; a field is asked for, and the
    fields there are named.
    """
    write_records(tmp_path / name)
    texts = read_texts(params(path=tmp_path, field="text"))
    assert texts.documents == ["one", "two\nlines é"]
    assert (texts.provenance["documents"], texts.provenance["empty"]) == (2, 1)
    assert texts.provenance["sha256"] == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}
    for field in (None, "body"):
        with pytest.raises(
            SparselineError, match=rf"no record with the field {field!r}; set .* one of its fields: text, id"
        ):
            read_texts(params(path=tmp_path / name, field=field))


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    """C4's files are so; and a record over several lines is one, too."""
    assert read_texts(params(path=records(tmp_path / "a.json", RECORDS), field="text")).documents == [
        "one",
        "two\nlines é",
    ]
    path = file(
        tmp_path / "b.json", json.dumps(RECORDS[0], indent=2) + "\n\n" + json.dumps(RECORDS[2], indent=2)
    )
    assert read_texts(params(path=path, field="text")).places == [f"{path}, line 1", f"{path}, line 6"]


def test_a_nested_field(tmp_path: Path) -> None:
    """A key that has dots itself comes first; Parquet's columns are found in the same way."""
    values = [
        {"meta": {"text": "inner"}, "meta.text": "literal", "meta.x": "y"},
        {"meta": {"text": "second"}, "meta.text": "other", "meta.x": "z"},
    ]
    assert read_texts(params(path=records(tmp_path / "a.jsonl", values), field="meta.text")).documents == [
        "literal",
        "other",
    ]
    bare = [{"meta": value["meta"]} for value in values]
    assert read_texts(params(path=records(tmp_path / "b.jsonl", bare), field="meta.text")).documents == [
        "inner",
        "second",
    ]
    Dataset.from_list(bare).to_parquet(tmp_path / "b.parquet")
    Dataset.from_list(values).to_parquet(tmp_path / "a.parquet")
    assert read_texts(params(path=tmp_path / "b.parquet", field="meta.text")).documents == ["inner", "second"]
    assert read_texts(params(path=tmp_path / "a.parquet", field="meta.text")).documents == [
        "literal",
        "other",
    ]
    for name in ("b.jsonl", "b.parquet"):
        with pytest.raises(SparselineError, match=r"no record with the field 'meta\.body'"):
            read_texts(params(path=tmp_path / name, field="meta.body"))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a", "a.txt.gz", "a.jsonl.bak"])
def test_a_field_is_never_ignored(tmp_path: Path, name: str) -> None:
    """A file that is read as one plain text has no fields, alone or beside record files."""
    raw = b'{"text": "one"}\n'
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(
        SparselineError, match=r"is read as one plain text, but the text's `field` is 'text'; .*glob"
    ):
        read_texts(params(path=tmp_path / name, field="text"))
    records(tmp_path / "b.jsonl", RECORDS)
    with pytest.raises(SparselineError, match="is read as one plain text"):
        read_texts(params(path=tmp_path, field="text"))
    assert read_texts(params(path=tmp_path, field="text", glob="*.jsonl")).documents[0] == "one"
    assert read_texts(params(path=tmp_path / name)).documents == ['{"text": "one"}\n']


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("stdlib", "glob", "*"),
        ("stdlib", "field", "text"),
        ("stdlib", "revision", "0" * 40),
        ("stdlib", "hub", {"id": "a/b"}),
        ("files", "revision", "main"),
        ("files", "hub", {"id": "a/b"}),
        ("hub", "glob", "*"),
        ("hub", "field", "text"),
    ],
)
def test_keys_that_a_kind_does_not_read_are_told(kind: str, key: str, value: Any) -> None:
    with pytest.raises(
        SparselineError, match=f"has `{key}`, which kind: {kind} does not read; set it to null"
    ):
        read_texts(params(kind, **{key: value}))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            '{"text": "one"}\n{"body": "two"}\n',
            r"a\.jsonl, line 2: no record with the field 'text'; set .* one of its fields: body\.",
        ),
        ('{"text": "one"}\n{"text": \n', "line 2: no JSON record begins here"),
        ('{"text": "one"}\n\n\n"two"\n', "line 4: a record must be an object with fields, not a string"),
        ('["one"]\n', "record 1: a record must be an object with fields, not a string"),
        ('{"text": "one"} {"text": "a\nb"}', "line 1: no JSON record begins here"),
        ("[" * 100_000, "line 1: no JSON record begins here"),
        ('{"text": 1' + "0" * 5000 + "}", "line 1: no JSON record begins here"),
        (
            '{"text": "one"}\n{"text": "a \\ud83d b"}',
            r"line 2: the text holds \\ud83d, half of a surrogate pair",
        ),
        (
            '{"text": "one"}\n{"text": [{"role": "user", "content": "\\udc00"}]}',
            r"line 2: the text holds \\udc00",
        ),
        ('{"text": "one", "a": "\0"}', "is not UTF-8 text .it holds NUL bytes"),
    ],
)
def test_record_mistakes_are_told_with_their_line(tmp_path: Path, content: str, problem: str) -> None:
    with pytest.raises(SparselineError, match=problem):
        read_texts(params(path=file(tmp_path / "a.jsonl", content), field="text"))


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz", "a.jsonl.gz", "a.txt.bz2", "a.json.xz"])
def test_damaged_files_are_told(tmp_path: Path, name: str) -> None:
    """Cut off in the middle, or nothing of the kind."""
    whole = gzip.compress(b"x" * 1000) if name.endswith(".gz") else b"PAR1 and other bytes"
    (tmp_path / name).write_bytes(whole[:-8])
    with pytest.raises(SparselineError, match=rf"{name} cannot be (decompressed|read as Parquet)"):
        read_texts(params(path=tmp_path / name, field="text" if "txt" not in name else None))


def test_zstd_without_its_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(
        SparselineError, match=r"a\.jsonl\.zst: zstd is read by the package zstandard, which is not installed"
    ):
        read_texts(params(path=tmp_path, field="text"))


@pytest.mark.parametrize("value", [5, {"a": 1}, True, 1.5])
def test_a_field_that_is_no_text_is_told(tmp_path: Path, value: Any) -> None:
    """Neither text nor a chat."""
    path = records(tmp_path / "a.jsonl", [{"text": "one"}, {"text": value}])
    with pytest.raises(
        SparselineError,
        match=(
            r"line 2: the text's `field` holds (a number|an object|true or false), neither text nor a list of"
            r" messages"
        ),
    ):
        read_texts(params(path=path, field="text"))


# Which files


def test_hidden_files_are_no_texts(tmp_path: Path) -> None:
    for name in ("a.txt", ".DS_Store", ".git/config", "deep/._b.txt", "deep/b.txt"):
        file(tmp_path / name, name)
    assert read_texts(params(path=tmp_path)).documents == ["a.txt", "deep/b.txt"]
    assert read_texts(params(path=tmp_path, glob="**/*.txt")).documents == ["a.txt", "deep/b.txt"]


def test_what_is_no_regular_file_is_told(tmp_path: Path) -> None:
    """A pipe would be waited for, a device has no end, a link to nothing has no text; a directory
    of a file's name is no file.
    """
    file(tmp_path / "x.jsonl" / "inner.txt", "inner")
    with pytest.raises(
        SparselineError, match=r"No file matches .*it has, for example, x\.jsonl/inner\.txt\."
    ):
        read_texts(params(path=tmp_path, glob="*.jsonl", field="text"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path, glob in (
        (tmp_path, "p*"),
        (tmp_path / "pipe", None),
        (tmp_path, "l*"),
        (Path("/dev/zero"), None),
    ):
        with pytest.raises(
            SparselineError, match=r"is not a regular file|is a link to a file that is not there"
        ):
            read_texts(params(path=path, glob=glob))


def test_what_dvc_does_not_watch_is_told(tmp_path: Path) -> None:
    """Oracle: DVC's hash of a directory, which has the content of linked files, but nothing of
    linked directories (tried on 3.67).
    """
    file(tmp_path / "other" / "b.txt", "b")
    file(tmp_path / "texts" / "a.txt", "a")
    (tmp_path / "texts" / "c.txt").symlink_to("a.txt")
    assert read_texts(params(path=tmp_path / "texts")).documents == ["a", "a"]
    (tmp_path / "texts" / "d.txt").symlink_to(tmp_path / "other" / "b.txt")
    with pytest.raises(SparselineError, match=r"d\.txt is a link to .*b\.txt, which is outside"):
        read_texts(params(path=tmp_path / "texts"))
    (tmp_path / "texts" / "d.txt").unlink()
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "other")
    for glob in (None, "link/*.txt", "*/*.txt"):
        with pytest.raises(SparselineError, match="link is a link to a directory, which DVC does not follow"):
            read_texts(params(path=tmp_path / "texts", glob=glob))
    for glob in ("../other/*.txt", str(tmp_path / "other" / "*.txt")):
        with pytest.raises(SparselineError, match="reaches outside its path"):
            read_texts(params(path=tmp_path / "texts", glob=glob))
    with pytest.raises(SparselineError, match="write the home directory in full"):
        read_texts(params(path=Path("~/texts")))


def test_a_glob_that_is_none_is_told(tmp_path: Path) -> None:
    path = file(tmp_path / "a.txt", "a")
    with pytest.raises(SparselineError, match="is not a pattern"):
        read_texts(params(path=tmp_path, glob=""))
    with pytest.raises(SparselineError, match=r"a\.txt is a file, but the text has glob"):
        read_texts(params(path=path, glob="*.txt"))


def test_a_file_name_in_another_encoding_is_told(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")).write_text("text")
    with pytest.raises(SparselineError, match="is not UTF-8; rename the file"):
        read_texts(params(path=tmp_path))


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_empty_files_are_told(tmp_path: Path, text: str) -> None:
    path = file(tmp_path / "a.txt", text)
    with pytest.raises(SparselineError, match=r"files text at .*a\.txt is empty"):
        read_texts(params(path=path))


def test_other_encodings_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SparselineError, match=r"a\.txt is not UTF-8 text \(.* at byte 3\)"):
        read_texts(params(path=tmp_path / "a.txt"))
    for encoding in ("utf-16", "utf-32", "utf-16-be"):
        mark = "\ufeff" if encoding == "utf-16-be" else ""
        (tmp_path / "a.txt").write_bytes((mark + "text").encode(encoding))
        with pytest.raises(SparselineError, match=r"a\.txt is UTF-16 or UTF-32 text; convert it"):
            read_texts(params(path=tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16-le"))
    with pytest.raises(SparselineError, match=r"a\.txt is not UTF-8 text \(it holds NUL bytes"):
        read_texts(params(path=tmp_path / "a.txt"))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}')
    assert read_texts(params(path=tmp_path / "a.txt")).documents == ["text"]
    assert read_texts(params(path=tmp_path / "b.jsonl", field="text")).documents == ["one"]


# Hub datasets, in the hub's layout but in a local directory


COMMIT = "0" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository of the dataset some/set: a directory that ``datasets`` reads instead."""
    load = datasets.load_dataset

    def local(path: str, *, revision: str, **options: Any) -> Any:
        assert revision == COMMIT
        return load(str(tmp_path / "hub" / path), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    (tmp_path / "hub" / "some" / "set").mkdir(parents=True)
    return tmp_path / "hub" / "some" / "set"


def test_wikitext_like(hub: Path) -> None:
    """A dataset of configs and parquet splits; all rows of a split are one text, joined by blank
    lines (the papers' protocol).
    """
    for config, split_name, lines in (
        ("wikitext-2-raw-v1", "test", ["", " = Title = \n", "some text\n"]),
        ("wikitext-2-raw-v1", "train", ["training\n"]),
        ("wikitext-103-raw-v1", "test", ["other\n"]),
    ):
        path = hub / config / f"{split_name}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        Dataset.from_dict({"text": lines}).to_parquet(path)
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {config}/{s}-*\n" for s in splits)
        for config, splits in (("wikitext-2-raw-v1", ("test", "train")), ("wikitext-103-raw-v1", ("test",)))
    )
    file(hub / "README.md", card + "---\n")
    entry = {"id": "some/set", "config": "wikitext-2-raw-v1", "split": "test", "field": "text", "join": True}
    texts = read_texts(params("hub", hub=entry, revision=COMMIT))
    assert texts.documents == ["\n\n = Title = \n\n\nsome text\n"]
    assert texts.provenance["dataset"] == entry
    assert texts.provenance["revision"] == COMMIT
    again = read_texts(params("hub", hub={**entry, "split": "train", "revision": COMMIT}))
    assert again.documents == ["training\n"]
    assert again.provenance["fingerprint"] != texts.provenance["fingerprint"]


def test_ptb_like(hub: Path) -> None:
    """JSON lines per split, another field; without ``join`` every row is a document."""
    records(hub / "test.jsonl", [{"sentence": "no it was <unk>"}, {"sentence": "a second one"}])
    entry = {"id": "some/set", "split": "test", "field": "sentence", "revision": COMMIT}
    assert read_texts(params("hub", hub=entry)).documents == ["no it was <unk>", "a second one"]
    assert read_texts(params("hub", hub={**entry, "join": True})).documents == [
        "no it was <unk>\n\na second one"
    ]


def test_c4_like(hub: Path, tmp_path: Path) -> None:
    """One compressed file of many, chosen by ``files``; the entry comes from a file of entries by name."""
    for number, text in enumerate(("first shard", "second shard")):
        path = hub / "en" / f"c4-validation.0000{number}-of-00008.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress((json.dumps({"text": text, "url": "u"}) + "\n").encode()))
    entry = {
        "id": "some/set",
        "split": "validation",
        "field": "text",
        "files": "en/c4-validation.00001-of-00008.json.gz",
        "revision": COMMIT,
    }
    path = file(tmp_path / "hub.json", json.dumps({"mine": entry}))
    texts = read_texts(params("hub", path, name="mine"))
    assert texts.documents == ["second shard"]
    assert texts.provenance["kind"] == "hub"


def test_the_shipped_hub_entries_are_complete() -> None:
    """Every entry of data/hub.json has what reading needs, and no key that nothing reads."""
    entries = json.loads((ROOT / "data" / "hub.json").read_text())
    assert {"wikitext2", "ptb", "c4", "c4-train"} <= entries.keys()
    for entry in entries.values():
        assert (
            {"id", "split", "field"}
            <= entry.keys()
            <= {"id", "config", "split", "field", "files", "join", "revision"}
        )
        assert len(entry.get("revision", COMMIT)) == 40


@pytest.mark.parametrize(
    "change",
    [
        {"split": "absent"},
        {"field": "absent"},
        {"id": "some/other"},
        {"config": "absent"},
        {"files": "absent.json.gz"},
    ],
)
def test_hub_mistakes_are_told(hub: Path, change: dict[str, str]) -> None:
    records(hub / "test.jsonl", [{"text": "one"}])
    entry = {"id": "some/set", "split": "test", "field": "text", "revision": COMMIT}
    with pytest.raises(SparselineError, match=r"cannot be loaded from the hub: .+") as caught:
        read_texts(params("hub", hub={**entry, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "problem"), [
    ({"feild": "text"}, "unknown key 'feild'; it may have: config, field"),
    ({"join": "yes"}, "join = 'yes' must be true or false"),
    ({"config": "a", "files": "b.json"}, "both 'config' and 'files'"),
    ({"id": "texts"}, "not a dataset of the hub"),
    ({"id": "json"}, "not a dataset of the hub"),
    ({"id": "a/texts"}, "not a dataset of the hub .* read with kind: files"),
    ({"id": "/a/texts"}, "not a dataset of the hub"),
    ({"id": "../texts"}, "not a dataset of the hub"),
    ({"files": "https://example.org/a.json"}, "outside the dataset's repository"),
    ({"files": "/a/b.json"}, "outside the dataset's repository"),
    ({"files": "en/../../b.json"}, "outside the dataset's repository"),
])  # fmt: skip
def test_what_the_hub_does_not_have_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], problem: str
) -> None:
    """``datasets`` would accept a directory or an address as an id or file, but DVC would watch
    none of them.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "texts").mkdir(parents=True)
    entry = {"id": "some/set", "split": "test", "field": "text", "revision": COMMIT}
    with pytest.raises(SparselineError, match=problem):
        read_texts(params("hub", hub={**entry, **change}))


@pytest.mark.parametrize("revision", [None, "main", "0" * 7, "refs/convert/parquet"])
def test_a_dataset_without_a_commit_is_told(monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    """The message names the newest commit if the hub answers."""
    entry = {"id": "some/set", "split": "test", "field": "text"}

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(
        SparselineError, match=r"not a commit and may change .* 40 hexadecimal digits .*Files, History\)\.$"
    ):
        read_texts(params("hub", hub=entry, revision=revision))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda *_, **__: type("Info", (), {"sha": "abc"})
    )
    with pytest.raises(SparselineError, match=r"the newest commit is abc"):
        read_texts(params("hub", hub=entry, revision=revision))


def test_a_name_beside_an_entry_is_told() -> None:
    with pytest.raises(SparselineError, match="both `hub` and name: c4"):
        read_texts(params("hub", hub={"id": "some/set"}, name="c4"))


@pytest.mark.parametrize("key", ["id", "split", "field"])
@pytest.mark.parametrize("files", [{}, {"files": "test.jsonl"}])
def test_an_incomplete_hub_entry_is_told(key: str, files: dict[str, str]) -> None:
    entry = {"id": "some/set", "split": "test", "field": "text", "revision": COMMIT, **files}
    entry.pop(key)
    with pytest.raises(SparselineError, match=f"has no '{key}'"):
        read_texts(params("hub", hub=entry))


def test_damaged_hub_files_are_told(hub: Path) -> None:
    file(hub / "test.jsonl", '{"text": "one"}\n{"text": ')
    with pytest.raises(SparselineError, match="cannot be loaded"):
        read_texts(params("hub", hub={"id": "some/set", "split": "test", "field": "text"}, revision=COMMIT))


# Tokens and rows


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return make_tokenizer(tmp_path / "tokenizer")


NONE = Start("none", None)


def test_encoding_adds_no_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Oracle: one token a byte."""
    encoded = encode(tokenizer, ["ab", "é"])
    assert [len(ids) for ids in encoded] == [2, 2]
    assert tokenizer.decode(encoded[1]) == "é"


def test_where_the_start_token_stands() -> None:
    """Oracle: by hand. Rows keep their length wherever it stands."""
    documents = [[1, 2, 3, 4], [5, 6, 7, 8, 9]]
    for place, expected in {
        "document": [[0, 1, 2, 3], [4, 0, 5, 6]],
        "row": [[0, 1, 2, 3], [0, 4, 5, 6]],
        "none": [[1, 2, 3, 4], [5, 6, 7, 8]],
    }.items():
        assert rows_of(documents, params(), Start(place, 0)).tolist() == expected  # type: ignore[arg-type]
    in_documents = rows_of(documents, params(packing="document", seed=1), Start("row", 0)).tolist()
    for row in in_documents:
        assert row[0] == 0 and row[1:] == list(range(row[1], row[1] + 3))


def test_a_chats_own_start_token_is_not_doubled() -> None:
    """Oracle: by hand. The template has begun both chats with 0."""
    chats = [[0, 1, 2, 3, 4], [0, 5, 6, 7]]
    for place, expected in {
        "document": [[0, 1, 2, 3], [4, 0, 5, 6]],
        "row": [[0, 1, 2, 3], [0, 4, 5, 6]],
        "none": [[1, 2, 3, 4]],
    }.items():
        rows = rows_of(chats, params(chat_template=True, rows=len(expected)), Start(place, 0))  # type: ignore[arg-type]
        assert rows.tolist() == expected


def test_the_familys_usual_place(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gemma is evaluated with the token before every row (lm-eval forces it), the others before
    every document.
    """
    assert start(None, "gemma", tokenizer) == Start("row", 0)
    assert start(None, "llama", tokenizer) == Start("document", 0)
    assert start("none", "gemma", tokenizer) == Start("none", 0)
    tokenizer.bos_token = None
    assert start(None, "opt", tokenizer) == Start("document", 0)  # EOS stands in
    tokenizer.eos_token = None
    assert start(None, "gemma", tokenizer) == NONE
    with pytest.raises(
        SparselineError, match="start: row, but the model's tokenizer has no start token; set start: none"
    ):
        start("row", "llama", tokenizer)


def test_text_of_too_few_tokens_is_told() -> None:
    """A letter again and again, start tokens alone, and rows that are all the same."""
    with pytest.raises(
        SparselineError, match="has only 2 different tokens in 3 samples, fewer than its `distinct` of 3"
    ):
        rows_of([[1] * 20, [1] * 20], params(rows=3, distinct=3), Start("document", 0))
    with pytest.raises(SparselineError, match="has only 1 different tokens"):
        rows_of([[0]] * 20, params(rows=3, distinct=2, chat_template=True), Start("document", 0))
    with pytest.raises(SparselineError, match="gives 3 samples that are all the same"):
        rows_of([[1, 2, 3, 4]] * 3, params(rows=3, distinct=4), NONE)
    assert len(rows_of([[1, 2, 3, 4], [5, 6, 7, 8]], params(distinct=8), NONE)) == 2


def test_concatenation_and_cut() -> None:
    """Oracle: by hand. Documents run on into one stream, cut into rows of 4; the rest is dropped;
    the first rows are taken.
    """
    documents = [[0, 1, 2], [0, 3], [0, 4, 5, 6, 7], [0]]
    assert rows_of(documents, params(rows=2), NONE).tolist() == [[0, 1, 2, 0], [3, 0, 4, 5]]
    assert rows_of(documents, params(rows=1), NONE).tolist() == [[0, 1, 2, 0]]
    assert rows_of(documents, params(rows=2), NONE).dtype == torch.int64
    whole = params(rows=None, use="evaluate", seed=1)  # all of them, in order, whatever the seed
    assert rows_of(documents, whole, NONE).tolist() == [[0, 1, 2, 0], [3, 0, 4, 5]]
    with pytest.raises(SparselineError, match="gives 0 samples of 4 tokens, but some are requested"):
        rows_of([[1, 2]], whole, NONE)


def test_drawing_is_by_seed_and_without_replacement() -> None:
    """All 50 rows drawn are all 50 rows; a seed repeats, another seed differs; fewer rows are the
    first of the same draw.
    """
    documents = [list(range(200))]
    first = rows_of(documents, params(rows=50, seed=1), NONE)
    assert sorted(row[0] for row in first.tolist()) == list(range(0, 200, 4))
    assert all(row == list(range(row[0], row[0] + 4)) for row in first.tolist())
    assert torch.equal(first, rows_of(documents, params(rows=50, seed=1), NONE))
    assert not torch.equal(first, rows_of(documents, params(rows=50, seed=2), NONE))
    assert not torch.equal(first, rows_of(documents, params(rows=50), NONE))
    assert torch.equal(first[:7], rows_of(documents, params(rows=7, seed=1), NONE))


def test_document_packing() -> None:
    """One row of each document that is long enough, from inside it; short ones are passed over."""
    documents = [list(range(100 * number, 100 * number + size)) for number, size in enumerate((9, 3, 4, 30))]
    rows = rows_of(documents, params(rows=3, packing="document", seed=3), NONE)
    assert sorted(row[0] // 100 for row in rows.tolist()) == [0, 2, 3]
    for row in rows.tolist():
        assert row == list(range(row[0], row[0] + 4))
        assert row[-1] in documents[row[0] // 100]
    assert torch.equal(rows, rows_of(documents, params(rows=3, packing="document", seed=3), NONE))
    starts = {
        rows_of(documents, params(rows=3, packing="document", seed=seed), NONE).sort(0).values[-1, 0].item()
        for seed in range(40)
    }
    assert len(starts) > 5
    assert len(rows_of(documents, params(rows=2, packing="document"), NONE)) == 2


@pytest.mark.parametrize(
    ("documents", "found"), [([], 0), ([[]], 0), ([[0, 1, 2]], 0), ([list(range(11))], 2)]
)
@pytest.mark.parametrize("packing", ["concatenate", "document"])
def test_too_little_text_is_told(documents: list[list[int]], found: int, packing: str) -> None:
    expected = min(found, 1) if packing == "document" else found
    with pytest.raises(
        SparselineError,
        match=(
            rf"gives {expected} samples of 4 tokens, but 3 are requested; give more text, or lower rows or"
            " length"
        ),
    ):
        rows_of(documents, params(rows=3, packing=packing, seed=0), NONE)


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (0.25, 2), (0.3, 3), (0.99, 9), (0.29, 2)])
def test_split(share: float, held_out: int) -> None:
    """The held-out rows are the last, rounded down; none is lost, and at least one fits."""
    rows = torch.arange(20).view(10, 2)
    parts = split(rows, share)
    assert len(parts["held_out"]) == held_out
    assert torch.equal(torch.cat([parts["fit"], parts["held_out"]]), rows)


@pytest.mark.parametrize("packing", ["concatenate", "document"])
@pytest.mark.parametrize("seed", [0, None])
def test_samples_for_training_are_further_ones(packing: str, seed: int | None) -> None:
    """Oracle: the samples without them, which stay the same."""
    documents = [list(range(start, start + 6)) for start in range(0, 120, 6)]
    few, many = (
        split(rows_of(documents, params(rows=8, packing=packing, seed=seed, training=more), NONE), 0.25, more)
        for more in (0, 4)
    )
    assert [len(many[name]) for name in ("fit", "held_out", "training")] == [6, 2, 4]
    assert len(few["training"]) == 0
    assert torch.equal(few["fit"], many["fit"]) and torch.equal(few["held_out"], many["held_out"])
    assert len(torch.cat(list(many.values())).unique(dim=0)) == 12
    every = rows_of(documents, params(rows=10, packing=packing, seed=seed, training=400), NONE)
    available = len(rows_of(documents, params(rows=None, use="evaluate", packing=packing), NONE))
    assert len(every) == 10 + (available - 10) // 4 * 4 < 410


@pytest.mark.parametrize(("count", "share", "held_out"), [(100, 0.29, 29), (100, 0.57, 57), (1000, 0.001, 1)])
def test_split_does_not_lose_a_row_to_rounding(count: int, share: float, held_out: int) -> None:
    """Oracle: decimal arithmetic. 100 · 0.29 is 28.999… in binary, but 29 rows were asked for."""
    assert len(split(torch.zeros(count, 2), share)["held_out"]) == held_out


@pytest.mark.parametrize(("count", "share"), [(3, 0.25), (10, 0.01), (2, 0.99), (2, 1e-9), (7, 1 - 1e-12)])
def test_split_leaves_neither_side_empty(count: int, share: float) -> None:
    """A share above 0 holds out at least one row, and at least one fits."""
    parts = split(torch.zeros(count, 2), share)
    assert min(len(parts["fit"]), len(parts["held_out"])) >= 1
    assert sum(len(part) for part in parts.values()) == count


def test_a_single_row_cannot_be_split() -> None:
    with pytest.raises(
        SparselineError,
        match=(
            "has 1 sample, which cannot be split into a training and a held-out split; raise rows, or"
            " set held_out: 0"
        ),
    ):
        split(torch.zeros(1, 2), 0.25)
    assert len(split(torch.zeros(1, 2), 0.0)["fit"]) == 1


# Chats and tokenizers


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
CALL = [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def chats(path: Path, *values: Any) -> Any:
    return read_texts(
        params(
            path=records(path / "chat.jsonl", [{"messages": value} for value in values]),
            field="messages",
            chat_template=True,
        )
    )


def test_chat_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Oracle: the template rendered by hand; the template alone decides on special tokens."""
    tokenizer.chat_template = TEMPLATE
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}],
            "name": None,
        },
        MESSAGES[1],
    ]
    texts = chats(tmp_path, MESSAGES, [], parts)
    assert texts.chats == [MESSAGES, MESSAGES]
    assert texts.provenance["empty"] == 1
    written = render(tokenizer, texts.chats, texts.places)
    assert written == ["user: hi\nassistant: yo\n"] * 2
    assert encode(tokenizer, written)[0] == tokenizer.apply_chat_template(
        MESSAGES, tokenize=True, return_dict=False
    )


def test_tool_calls_have_no_content(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Null is no text: not "None" in the rendering."""
    tokenizer.chat_template = TEMPLATE.replace(
        "\n", "{{ m['tool_calls'] | length if m['tool_calls'] else '' }}\n"
    )
    texts = chats(tmp_path, [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": CALL}])
    assert render(tokenizer, texts.chats, texts.places) == ["user: hi\nassistant: 1\n"]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("hi", " is a string; "),
        (
            {"from": "human", "value": "hi"},
            "has 'from', 'value'; .* rename 'from' to 'role' and 'value' to 'content'",
        ),
        ({"content": "hi"}, "a message is an object with 'role' and 'content'"),
        ({"role": "user"}, "a message is an object with 'role' and 'content'"),
        ({"role": None, "content": "hi"}, "a message is an object with 'role' and 'content'"),
        ({"role": "user", "content": None}, "has null as content"),
        ({"role": "user", "content": None, "tool_calls": []}, "has null as content"),
        ({"role": "user", "content": 5}, "has a number as content"),
        ({"role": "user", "content": {"text": "hi"}}, "has an object as content"),
        ({"role": "user", "content": [{"type": "image"}]}, "has a part that is not text"),
        ({"role": "user", "content": ["hi"]}, "has a part that is not text"),
        ({}, "has no keys"),
    ],
)
def test_messages_are_checked_before_a_template_sees_them(tmp_path: Path, message: Any, problem: str) -> None:
    with pytest.raises(SparselineError, match=rf"chat\.jsonl, line 2: message 2.*{problem}"):
        chats(tmp_path, MESSAGES, [MESSAGES[0], message])


@pytest.mark.parametrize(("template", "reason"), [
    ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
    ("{{ messages[ }}", "TemplateSyntaxError: "),
    ("{{ messages[0]['name']['first'] }}", "UndefinedError: "),
    ("{{ messages[0]['content'] + 1 }}", "TypeError: "),
    ("{{ 1 / 0 }}", "ZeroDivisionError: "),
    ("{{ messages | no_such_filter }}", "TemplateAssertionError: "),
    ({"tool_use": TEMPLATE}, "ValueError: "),
])  # fmt: skip
def test_a_templates_own_error_is_told(
    tokenizer: PreTrainedTokenizerBase, template: Any, reason: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(
        SparselineError,
        match=rf"a\.jsonl, line 7: the model's chat template does not take this record \({reason}.*\)",
    ):
        render(tokenizer, [MESSAGES], ["a.jsonl, line 7"])


def test_a_template_that_leaves_text_out_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    """Roles that the template does not know, wherever they first appear, and tool calls. Oracle:
    what the template prints.
    """
    known = (
        "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}{{ m['content'] | trim }}{% endif"
        " %}{% endfor %}"
    )
    tokenizer.chat_template = known
    assert render(tokenizer, [MESSAGES, MESSAGES], ["1", "2"]) == ["hiyo", "hiyo"]
    other = [MESSAGES[0], {"role": "gpt", "content": "yo"}]
    with pytest.raises(
        SparselineError, match=r"^line 2: .* leaves out the content of messages with the role 'gpt'"
    ):
        render(tokenizer, [MESSAGES, other], ["line 1", "line 2"])
    called = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": CALL}]
    with pytest.raises(
        SparselineError, match=r"^line 2: .* leaves out the tool calls of messages with the role 'assistant'"
    ):
        render(tokenizer, [MESSAGES, called], ["line 1", "line 2"])


def test_chat_mistakes_are_told(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(SparselineError, match="this model's tokenizer has none; set it to false"):
        render(tokenizer, [MESSAGES], ["a"])
    path = records(tmp_path / "a.jsonl", [{"text": "plain", "messages": MESSAGES}])
    with pytest.raises(SparselineError, match="line 1: this is a list of messages; set chat_template: true"):
        read_texts(params(path=path, field="messages"))
    with pytest.raises(SparselineError, match="line 1: chat_template is true, but this is plain text"):
        read_texts(params(path=path, field="text", chat_template=True))


@pytest.mark.parametrize("name", ["my text", "a.b", "a/b", "..", "", "é", "a:b", 5, True])
def test_names_that_cannot_be_used_are_told(name: Any) -> None:
    with pytest.raises(
        SparselineError,
        match=r"the text name .* cannot be used: a name may have letters, digits, '-' and '_'",
    ):
        check_name("text", name)


def test_names_that_can_be_used() -> None:
    for name in ("test", "c4-train", "WikiText_2"):
        check_name("text", name)


def test_the_models_tokenizer_is_loaded(model_paths: dict[str, Path]) -> None:
    found = load_tokenizer(model_paths["opt"], VOCABULARY)
    assert found.bos_token == END
    assert found("ab", add_special_tokens=False)["input_ids"] == found.convert_tokens_to_ids(["a", "b"])


def test_a_tokenizer_of_another_model_is_told(model_paths: dict[str, Path]) -> None:
    """Letters without an embedding are certain to be met; one rare byte without one is not (its
    rows are refused).
    """
    with pytest.raises(
        SparselineError,
        match=r"the tokenizer does not match the model: plain text gives ids up to \d+, .* has 80",
    ):
        load_tokenizer(model_paths["opt"], 80)
    assert load_tokenizer(model_paths["opt"], 256) is not None


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_missing_tokenizer_is_told(copy_of: Callable[[str], Path], family: str) -> None:
    """A model directory without tokenizer files: not an empty tokenizer."""
    path = copy_of(family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    with pytest.raises(SparselineError, match="holds no tokenizer"):
        load_tokenizer(path, VOCABULARY)


def test_a_damaged_tokenizer_is_told(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("llama")
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(SparselineError, match="holds no tokenizer"):
        load_tokenizer(path, VOCABULARY)


# Parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, r"texts\.x\.rows = 0"),
        ({"length": 1}, r"texts\.x\.length = 1"),
        ({"held_out": 1.0}, r"texts\.x\.held_out = 1\.0"),
        ({"held_out": -0.1}, r"texts\.x\.held_out = -0\.1"),
        ({"training": -4}, r"texts\.x\.training = -4"),
        ({"training": 6}, r"texts\.x\.training = 6 .*multiple of 4"),
        ({"use": "evaluate", "training": 4}, "only a text with use: calibrate has samples for training"),
        ({"kind": "web"}, r"texts\.x\.kind = 'web' .*'stdlib', 'files', 'hub' or 'generated'"),
        ({"packing": "greedy"}, r"texts\.x\.packing = 'greedy'"),
        ({"typo": 1}, r"texts\.x\.typo is not a known key"),
    ],
)
def test_bad_text_parameters_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SparselineError, match=message):
        params(**change)
