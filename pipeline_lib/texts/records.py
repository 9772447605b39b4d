"""Files of text and of records: format, compression, encoding, and the position of each record.

JSON is read by Python's json and Parquet by pyarrow, not by ``datasets``. That package gives all
records the same keys (a message gets the keys of all other messages, as nulls, which a chat
template sees), does not name lines in its errors, and writes a cache.
"""

import bz2
import codecs
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline_lib.core.errors import SparselineError

Placed = tuple[str, Any]  # where a record was read ("a.jsonl, line 3"), and the record
KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
SPACE = re.compile(r"[ \t\r\n]*")  # what JSON counts as white space


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


# each reads one frame, and keeps the bytes behind it as ``unused_data``
COMPRESSIONS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd,
}
PIECE = 2**16  # compressed bytes that are read at a time
# compressed text takes about a tenth of its bytes: a file that grows by more than this factor,
# beyond 32 MB, is meant to fill memory
RATIO, SMALL = 100, 2**25


def _suffix(path: Path) -> str:
    """The suffix in lower case, without that of a compression."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def holds_records(path: Path) -> bool:
    """Whether a file has records, by its name; any other file is one plain text."""
    return _suffix(path) in READERS


def unpack(path: Path, raw: bytes) -> bytes:
    """A file's bytes, decompressed if its last suffix names a compression.

    Raises:
        SparselineError: the bytes are damaged or decompress to too much, or a package is missing.
    """
    decompressor = COMPRESSIONS.get(path.suffix.lower())
    if decompressor is None:
        return raw
    found = bytearray()
    try:
        for piece in _decompressed(decompressor, raw):
            found += piece
            if len(found) > max(SMALL, RATIO * len(raw)):
                raise SparselineError(
                    f"{path} holds more than {len(found):,} bytes in {len(raw):,}, which is not text;"
                    " remove it."
                )
    except ImportError as error:
        raise SparselineError(
            f"{path}: zstd is read by the package zstandard, which is not installed: pip install zstandard;"
            " or decompress the file."
        ) from error
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise SparselineError(
            f"{path} cannot be decompressed ({error}); its name says {path.suffix}."
        ) from error
    return bytes(found)


def _decompressed(decompressor: Callable[[], Any], raw: bytes) -> Iterator[bytes]:
    """Decompress piece by piece, frame after frame. Zeros behind a frame are padding."""
    place, frame = 0, None
    while place < len(raw):
        if frame is None:
            if raw[place] == 0 and place:
                place += 1
                continue
            frame = decompressor()
        piece = raw[place : place + PIECE]
        try:
            yield frame.decompress(piece)
        except Exception as error:
            if type(error).__name__ == "ZstdError":  # its package may not be installed
                raise OSError(str(error)) from error
            raise
        place += len(piece) - len(frame.unused_data)
        if frame.eof:
            frame = None
    if frame is not None:
        raise EOFError("the file ends too early")


def decode(path: Path, raw: bytes) -> str:
    """UTF-8 text without a byte order mark.

    Raises:
        SparselineError: the bytes have another encoding or are not text.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise SparselineError(
            f"{path} is UTF-16 or UTF-32 text; convert it to UTF-8, for example with `iconv -f UTF-16 -t"
            " UTF-8`."
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SparselineError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if "\0" in text:
        raise SparselineError(
            f"{path} is not UTF-8 text (it holds NUL bytes: another encoding, or not text at all)."
        )
    return text


def kind(value: Any) -> str:
    """The type of a value, in JSON's words."""
    return KINDS.get(type(value), f"a value of type {type(value).__name__}")


def check_characters(value: Any, where: str) -> None:
    """Refuse lone surrogates, which JSON can contain but no tokenizer accepts.

    Raises:
        SparselineError: a string within ``value`` contains one.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(error.object[error.start]):04x}"
        raise SparselineError(
            f"{where}: the text holds {found}, half of a surrogate pair, which is not a character; remove it."
        ) from error


def read_records(path: Path, raw: bytes, field: str | None) -> Iterator[Placed]:
    """``field`` of every record of a file, with the record's position.

    Raises:
        SparselineError: the file is damaged, or a record has no such field.
    """
    for where, record in READERS[_suffix(path)](path, raw, field):
        yield where, pick(record, field, where)


def pick(record: Any, field: str | None, where: str) -> Any:
    """A record's field: the key itself, or the path of keys separated by dots.

    Raises:
        SparselineError: the record is not an object, or has no such field.
    """
    if not isinstance(record, dict):
        raise SparselineError(f"{where}: a record must be an object with fields, not {kind(record)}.")
    value: Any = record
    for key in [field] if field in record else (field or "").split("."):
        if not isinstance(value, dict) or key not in value:
            raise _no_field(where, field, record)
        value = value[key]
    return value


def _no_field(where: str, field: str | None, names: Iterable[Any]) -> SparselineError:
    has = ", ".join(map(str, names)) or "none"
    return SparselineError(
        f"{where}: no record with the field {field!r}; set the text's `field` to one of its fields: {has}."
    )


def _json(path: Path, raw: bytes, field: str | None) -> Iterator[Placed]:
    """One array of records, or records one after the other (JSON Lines, but a record may also span lines)."""
    text = decode(path, raw)
    decoder = json.JSONDecoder()
    end, line = 0, 1
    while True:
        begin = _after_space(text, end)
        line += text.count("\n", end, begin)
        if begin == len(text):
            return
        try:
            value, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", type(error).__name__)
            raise SparselineError(f"{path}, line {line}: no JSON record begins here ({reason}).") from error
        if isinstance(value, list) and line == 1 and _after_space(text, end) == len(text):
            yield from ((f"{path}, record {number}", record) for number, record in enumerate(value, 1))
            return
        yield f"{path}, line {line}", value
        line += text.count("\n", begin, end)


def _after_space(text: str, begin: int) -> int:
    found = SPACE.match(text, begin)
    assert found is not None  # the pattern also matches the empty string
    return found.end()


def _parquet(path: Path, raw: bytes, field: str | None) -> Iterator[Placed]:
    """Records of a Parquet file, of which only the field's own column is read."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        file = ParquetFile(pyarrow.BufferReader(raw))
        names = file.schema_arrow.names
        column = field if field in names else (field or "").split(".")[0]
        if column not in names:
            raise _no_field(str(path), field, names)
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(column).to_pylist():
                number += 1
                yield f"{path}, record {number}", {column: value}
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise SparselineError(
            f"{path} cannot be read as Parquet after {number} records: {' '.join(str(error).split())}"
        ) from error


READERS = {".jsonl": _json, ".ndjson": _json, ".json": _json, ".parquet": _parquet}
