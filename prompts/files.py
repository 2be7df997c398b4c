"""Files of prompts: JSON lines, plain or gzipped, and parquet."""

import gzip
import importlib
import os
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

import msgspec

from harness.errors import UserError
from prompts.formats import Row, read
from prompts.prompt import Prompt

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def read_file(path: Path, *, stem: str | None = None) -> tuple[Prompt, ...]:
    """All prompts of a file; `stem` (by default the file's) names categories and ids where the file does not.

    Raises UserError, in one line that says what to do, where the file cannot be used.
    """
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    prompts = read(rows, stem=stem or stem_of(path.name))
    if not prompts:
        raise UserError(f"{str(path)!r} is empty; write one JSON object on each line")
    return prompts


def stem_of(name: str) -> str:
    """`question` for `question.jsonl.gz`."""
    return name.removesuffix(".gz").rsplit(".", 1)[0] or name


def missing_file(spec: str, names: tuple[str, ...]) -> UserError:
    """The error for a spec that is neither a file nor one of `names`, with what is close to it."""
    folder = Path(os.path.expanduser(spec)).parent
    try:
        files = [str(Path(spec).parent / path.name) for path in folder.iterdir() if path.name.endswith(SUFFIXES)]
    except (OSError, ValueError):  # no such folder, or no name that a folder can have
        files = []
    close = get_close_matches(spec, [*names, *sorted(files)], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, close))}? Otherwise give" if close else "give"
    return UserError(
        f"no prompts at {spec!r}; {hint} {', '.join(names)}, the path of a JSONL file, or hf:org/name for the hub"
    )


def _json_rows(path: Path) -> Iterator[Row]:
    # Lines end at "\n" only: str.splitlines would also cut at U+2028, which JSON allows inside a text.
    for number, line in enumerate(_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            value: object = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: not JSON ({reason}); write one object on each line, in UTF-8") from error
        yield Row(where, number, value)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{str(path)!r} is not a whole gzip file ({error}); compress or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} ({error.strerror}); give a JSONL file that you may read") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise UserError(f"{path.name} is a parquet file; `pip install pyarrow`, or give a JSONL file") from error
    try:
        values: list[object] = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {str(path)!r} as parquet ({reason}); download it again") from error
    for number, value in enumerate(values, start=1):
        yield Row(f"{path.name} row {number}", number, value)
