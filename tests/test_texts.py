"""Texts to rows. Oracles: hand-made documents in every source's own layout, and the protocol spelt out token by token."""

import gzip
import hashlib
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import END, VOCABULARY, make_tokenizer
from transformers import PreTrainedTokenizerBase

from pipeline_lib.calibration.rows import encode, rows_of, split
from pipeline_lib.calibration.texts import TextParams, read_texts
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import parse
from pipeline_lib.models.tokenizer import load_tokenizer

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
        "chat_template": False,
        "packing": "concatenate",
        "rows": 2,
        "length": 4,
        "held_out": 0.0,
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
    """Calibration, validation and test text share no module, and Python here has all of them."""
    lists = json.loads((ROOT / "data" / "stdlib.json").read_text())
    assert set(LISTS) <= lists.keys()
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
    assert texts.provenance["sha256"] == {m: hashlib.sha256(c).hexdigest() for m, c in zip(modules, raw, strict=True)}
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
    with pytest.raises(SparselineError, match=r"No file matches .*\.rst; correct the text's path or glob"):
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
    """Oracle: RFC 8259 allows U+2028, U+2029 and U+0085 raw inside strings, and web text holds them; only \\n ends a record."""
    text = f"before{separator}after"
    line = json.dumps({"text": text}, ensure_ascii=separator < " ")
    assert read_texts(params(path=file(tmp_path / "a.jsonl", line + "\r\n" + line), field="text")).documents == [text, text]


def test_jsonl_mistakes_are_told_with_their_line(tmp_path: Path) -> None:
    path = records(tmp_path / "a.jsonl", [{"text": "one"}, {"body": "two"}])
    with pytest.raises(SparselineError, match=r"a\.jsonl, line 2: no JSON record with the field 'text'; set the text's `field`"):
        read_texts(params(path=path, field="text"))
    with pytest.raises(SparselineError, match="line 1: no JSON record with the field None"):
        read_texts(params(path=path))
    file(path, '{"text": "one"}\n{"text": \n')
    with pytest.raises(SparselineError, match="line 2: no JSON record"):
        read_texts(params(path=path, field="text"))
    file(path, '["one"]\n')
    with pytest.raises(SparselineError, match="line 1: no JSON record"):
        read_texts(params(path=path, field="text"))


@pytest.mark.parametrize("value", [5, {"a": 1}, ["plain", "strings"], True])
def test_a_field_that_is_no_text_is_told(tmp_path: Path, value: Any) -> None:
    """A number, an object, a list of something else than messages: neither text nor a chat."""
    path = records(tmp_path / "a.jsonl", [{"text": value}])
    with pytest.raises(SparselineError, match="field"):
        encode(make_tokenizer(tmp_path), read_texts(params(path=path, field="text")).documents, chat_template=False)


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_empty_files_are_told(tmp_path: Path, text: str) -> None:
    path = file(tmp_path / "a.txt", text)
    with pytest.raises(SparselineError, match=r"files text at .*a\.txt is empty"):
        read_texts(params(path=path))


def test_other_encodings_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SparselineError, match=r"a\.txt is not UTF-8 text \(.* at byte 3\)"):
        read_texts(params(path=tmp_path / "a.txt"))


# Hub datasets, in the hub's layout but in a local directory


def test_wikitext_like(tmp_path: Path) -> None:
    """A dataset of configs and parquet splits; all rows of a split are one text, joined by blank lines (the papers' protocol)."""
    for config, split_name, lines in (
        ("wikitext-2-raw-v1", "test", ["", " = Title = \n", "some text\n"]),
        ("wikitext-2-raw-v1", "train", ["training\n"]),
        ("wikitext-103-raw-v1", "test", ["other\n"]),
    ):
        path = tmp_path / config / f"{split_name}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        Dataset.from_dict({"text": lines}).to_parquet(path)
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n" + "".join(f"  - split: {s}\n    path: {config}/{s}-*\n" for s in splits)
        for config, splits in (("wikitext-2-raw-v1", ("test", "train")), ("wikitext-103-raw-v1", ("test",)))
    )
    file(tmp_path / "README.md", card + "---\n")
    entry = {"id": str(tmp_path), "config": "wikitext-2-raw-v1", "split": "test", "field": "text", "join": True}
    texts = read_texts(params("hub", hub=entry))
    assert texts.documents == ["\n\n = Title = \n\n\nsome text\n"]
    assert texts.provenance["dataset"] == entry
    assert texts.provenance["revision"] is None
    again = read_texts(params("hub", hub={**entry, "split": "train"}))
    assert again.documents == ["training\n"]
    assert again.provenance["fingerprint"] != texts.provenance["fingerprint"]


def test_ptb_like(tmp_path: Path) -> None:
    """JSON lines per split, another field; without ``join`` every row is a document."""
    records(tmp_path / "test.jsonl", [{"sentence": "no it was <unk>"}, {"sentence": "a second one"}])
    entry = {"id": str(tmp_path), "split": "test", "field": "sentence"}
    assert read_texts(params("hub", hub=entry)).documents == ["no it was <unk>", "a second one"]
    assert read_texts(params("hub", hub={**entry, "join": True})).documents == ["no it was <unk>\n\na second one"]


def test_c4_like(tmp_path: Path) -> None:
    """One compressed file of many, chosen by ``files``; the entry comes from a file of entries by name."""
    for number, text in enumerate(("first shard", "second shard")):
        path = tmp_path / "c4" / "en" / f"c4-validation.0000{number}-of-00008.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress((json.dumps({"text": text, "url": "u"}) + "\n").encode()))
    entry = {
        "id": str(tmp_path / "c4"),
        "config": "en",
        "split": "validation",
        "field": "text",
        "files": "en/c4-validation.00001-of-00008.json.gz",
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
        assert {"id", "split", "field"} <= entry.keys() <= {"id", "config", "split", "field", "files", "join"}


@pytest.mark.parametrize(
    "change", [{"split": "absent"}, {"field": "absent"}, {"id": "no/such-dataset"}, {"config": "absent"}, {"files": "absent.json.gz"}]
)
def test_hub_mistakes_are_told(tmp_path: Path, change: dict[str, str]) -> None:
    records(tmp_path / "test.jsonl", [{"text": "one"}])
    entry = {"id": str(tmp_path), "split": "test", "field": "text"}
    with pytest.raises(SparselineError, match=r"cannot be loaded from the hub or as a directory: .+") as caught:
        read_texts(params("hub", hub={**entry, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["id", "split", "field"])
@pytest.mark.parametrize("files", [{}, {"files": "test.jsonl"}])
def test_an_incomplete_hub_entry_is_told(tmp_path: Path, key: str, files: dict[str, str]) -> None:
    records(tmp_path / "test.jsonl", [{"text": "one"}])
    entry = {"id": str(tmp_path), "split": "test", "field": "text", **files}
    entry.pop(key)
    with pytest.raises(SparselineError, match=key):
        read_texts(params("hub", hub=entry))


def test_damaged_hub_files_are_told(tmp_path: Path) -> None:
    file(tmp_path / "test.jsonl", '{"text": "one"}\n{"text": ')
    with pytest.raises(SparselineError, match="cannot be loaded"):
        read_texts(params("hub", hub={"id": str(tmp_path), "split": "test", "field": "text"}))


# Tokens and rows


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return make_tokenizer(tmp_path / "tokenizer")


def test_each_document_starts_with_the_start_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Oracle: one token a byte, after the start token (0); text that looks like a special token does not end there."""
    encoded = encode(tokenizer, ["ab", "é"], chat_template=False)
    assert [len(ids) for ids in encoded] == [3, 3]
    assert [ids[0] for ids in encoded] == [0, 0]
    assert tokenizer.decode(encoded[1][1:]) == "é"


def test_eos_stands_in_for_a_missing_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.bos_token = None
    assert encode(tokenizer, ["a"], chat_template=False)[0][0] == 0
    tokenizer.eos_token = None
    assert len(encode(tokenizer, ["a"], chat_template=False)[0]) == 1


def test_concatenation_and_cut() -> None:
    """Oracle: by hand. Documents run on into one stream, cut into rows of 4; the rest is dropped; the first rows are taken."""
    documents = [[0, 1, 2], [0, 3], [0, 4, 5, 6, 7], [0]]
    assert rows_of(documents, params(rows=2)).tolist() == [[0, 1, 2, 0], [3, 0, 4, 5]]
    assert rows_of(documents, params(rows=1)).tolist() == [[0, 1, 2, 0]]
    assert rows_of(documents, params(rows=2)).dtype == torch.int64


def test_drawing_is_by_seed_and_without_replacement() -> None:
    """All 50 rows drawn are all 50 rows; a seed repeats, another seed differs; fewer rows are the first of the same draw."""
    documents = [list(range(200))]
    first = rows_of(documents, params(rows=50, seed=1))
    assert sorted(row[0] for row in first.tolist()) == list(range(0, 200, 4))
    assert all(row == list(range(row[0], row[0] + 4)) for row in first.tolist())
    assert torch.equal(first, rows_of(documents, params(rows=50, seed=1)))
    assert not torch.equal(first, rows_of(documents, params(rows=50, seed=2)))
    assert not torch.equal(first, rows_of(documents, params(rows=50)))
    assert torch.equal(first[:7], rows_of(documents, params(rows=7, seed=1)))


def test_document_packing() -> None:
    """One row of each document that is long enough, from inside it; short ones are passed over."""
    documents = [list(range(100 * number, 100 * number + size)) for number, size in enumerate((9, 3, 4, 30))]
    rows = rows_of(documents, params(rows=3, packing="document", seed=3))
    assert sorted(row[0] // 100 for row in rows.tolist()) == [0, 2, 3]
    for row in rows.tolist():
        assert row == list(range(row[0], row[0] + 4))
        assert row[-1] in documents[row[0] // 100]
    assert torch.equal(rows, rows_of(documents, params(rows=3, packing="document", seed=3)))
    starts = {rows_of(documents, params(rows=3, packing="document", seed=seed)).sort(0).values[-1, 0].item() for seed in range(40)}
    assert len(starts) > 5
    assert len(rows_of(documents, params(rows=2, packing="document"))) == 2


@pytest.mark.parametrize(("documents", "found"), [([], 0), ([[]], 0), ([[0, 1, 2]], 0), ([list(range(11))], 2)])
@pytest.mark.parametrize("packing", ["concatenate", "document"])
def test_too_little_text_is_told(documents: list[list[int]], found: int, packing: str) -> None:
    expected = min(found, 1) if packing == "document" else found
    with pytest.raises(
        SparselineError, match=rf"gives {expected} rows of 4 tokens, but 3 are asked for; give more text or lower rows or length"
    ):
        rows_of(documents, params(rows=3, packing=packing, seed=0))


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (0.25, 2), (0.3, 3), (0.99, 9), (0.29, 2)])
def test_split(share: float, held_out: int) -> None:
    """The held-out rows are the last, rounded down; none is lost, and at least one fits."""
    rows = torch.arange(20).view(10, 2)
    parts = split(rows, share)
    assert len(parts["held_out"]) == held_out
    assert torch.equal(torch.cat([parts["fit"], parts["held_out"]]), rows)


@pytest.mark.parametrize(("count", "share", "held_out"), [(100, 0.29, 29), (100, 0.57, 57), (1000, 0.001, 1)])
def test_split_does_not_lose_a_row_to_rounding(count: int, share: float, held_out: int) -> None:
    """Oracle: decimal arithmetic. 100 · 0.29 is 28.999… in binary, but 29 rows were asked for."""
    assert len(split(torch.zeros(count, 2), share)["held_out"]) == held_out


@pytest.mark.parametrize(("count", "share"), [(3, 0.25), (10, 0.01), (2, 0.99), (2, 1e-9), (7, 1 - 1e-12)])
def test_split_leaves_neither_side_empty(count: int, share: float) -> None:
    """A share above 0 holds out at least one row, and at least one fits."""
    parts = split(torch.zeros(count, 2), share)
    assert min(len(part) for part in parts.values()) >= 1
    assert sum(len(part) for part in parts.values()) == count


def test_a_single_row_cannot_be_split() -> None:
    with pytest.raises(
        SparselineError, match="has 1 row, which cannot be split into fitting and held-out rows; raise rows, or set held_out: 0"
    ):
        split(torch.zeros(1, 2), 0.25)
    assert len(split(torch.zeros(1, 2), 0.0)["fit"]) == 1


# Chats and tokenizers


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_chat_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Oracle: the template rendered by hand; the template alone decides on special tokens."""
    tokenizer.chat_template = TEMPLATE
    documents = read_texts(
        params(path=records(tmp_path / "a.jsonl", [{"messages": MESSAGES}, {"messages": []}]), field="messages")
    ).documents
    assert documents == [MESSAGES]
    encoded = encode(tokenizer, documents, chat_template=True)
    assert all(isinstance(token, int) for token in encoded[0])
    assert tokenizer.decode(encoded[0]) == "user: hi\nassistant: yo\n"


def test_chat_mistakes_are_told(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(SparselineError, match="this model's tokenizer has none; set it to false"):
        encode(tokenizer, [MESSAGES], chat_template=True)
    with pytest.raises(SparselineError, match="a document is a list of messages; set chat_template: true"):
        encode(tokenizer, [MESSAGES], chat_template=False)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(SparselineError, match="a document is plain text; give lists of"):
        encode(tokenizer, [MESSAGES, "plain"], chat_template=True)


def test_the_models_tokenizer_is_loaded(model_paths: dict[str, Path]) -> None:
    found = load_tokenizer(model_paths["opt"], VOCABULARY)
    assert found.bos_token == END
    assert found("ab", add_special_tokens=False)["input_ids"] == found.convert_tokens_to_ids(["a", "b"])


def test_a_tokenizer_of_another_model_is_told(model_paths: dict[str, Path]) -> None:
    with pytest.raises(SparselineError, match=r"tokenizer does not match the model: its ids go up to 256, the model's vocabulary has 256"):
        load_tokenizer(model_paths["opt"], 256)
    assert load_tokenizer(model_paths["opt"], 257) is not None


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
        ({"kind": "web"}, r"texts\.x\.kind = 'web' .*'stdlib', 'files' or 'hub'"),
        ({"packing": "greedy"}, r"texts\.x\.packing = 'greedy'"),
        ({"typo": 1}, r"texts\.x\.typo is not a known key"),
    ],
)
def test_bad_text_parameters_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SparselineError, match=message):
        params(**change)
