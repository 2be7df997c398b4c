"""Prompt sets on the Hugging Face hub: one data file of a data set, at the commit that its main branch has now."""

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from harness.errors import UserError
from prompts.files import SUFFIXES


class Download(NamedTuple):
    path: Path
    file: str
    revision: str
    license: str | None


def split_id(spec: str) -> tuple[str, str | None] | None:
    """`org/name` and the file or split of `org/name[:file-or-split]`; None where `spec` is no such id."""
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(.+))?", spec)
    return (found[1], found[2]) if found else None


def fetch(repo: str, part: str | None) -> Download:
    """Download the file of `repo` that `part` names: a path, or words of one, such as `test` or `main/test`.

    Raises UserError, in one line, where the hub cannot be read or `part` does not name exactly one file.
    """
    hub = _client()
    try:
        info = hub.HfApi().dataset_info(repo)
        names: list[str] = [entry.rfilename for entry in info.siblings or ()]
        tags: list[str] = list(info.tags or ())
        revision = str(info.sha)
    except Exception as error:  # the client's own errors, and its transport's, which change with its releases
        raise _unreadable(repo, error) from error
    file = choose([name for name in names if name.endswith(SUFFIXES)], repo=repo, part=part)
    try:
        path = Path(hub.hf_hub_download(repo, file, repo_type="dataset", revision=revision))
    except Exception as error:
        raise _unreadable(repo, error) from error
    terms = next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None)
    return Download(path, file, revision, terms)


def choose(files: list[str], *, repo: str, part: str | None) -> str:
    """The one file that `part` names; UserError lists the files where it names none or several."""
    if not files:
        raise UserError(f"{repo!r} has no JSONL or parquet file; download what it has and convert it to JSONL")
    wanted = _words(part or "")
    fitting = [name for name in files if name == part] or [name for name in files if wanted <= _words(name)]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join((fitting or files)[:6]) + (", ..." if len(fitting or files) > 6 else "")
    says = "several files" if fitting else f"no file {part!r}"
    raise UserError(f"{repo!r} has {says}; name one, as in hf:{repo}:{(fitting or files)[0]} (it has {listed})")


def _words(name: str) -> set[str]:
    return set(re.findall(r"[A-Za-z0-9]+", name))


def _client() -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise UserError("prompts on the hub need `pip install huggingface_hub`, or give a JSONL file") from error


def _unreadable(repo: str, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return UserError(
        f"cannot read {repo!r} from the Hugging Face hub ({reason}); "
        "check the name and the network, or download its file and give the path"
    )
