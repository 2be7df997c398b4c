"""Prompt sets: our own two, files in the public formats, and data sets on the Hugging Face hub."""

import os
from collections.abc import Mapping
from pathlib import Path

from harness.errors import UserError
from prompts import hub
from prompts.files import SUFFIXES, missing_file, read_file, stem_of
from prompts.prompt import Prompt, PromptSet, take

__all__ = ["Prompt", "PromptSet", "available", "load"]

STANDARD = Path(__file__).with_name("standard.jsonl")
# Short prompts of eight kinds, two of them with a second turn: enough to see a decoder work on a slow CPU.
QUICK = (
    "writing-01",
    "roleplay-04",
    "reasoning-07",
    "math-02",
    "coding-02",
    "extraction-05",
    "stem-03",
    "translation-03",
)


def load(spec: str, *, limit: int | None = None) -> PromptSet:
    """The prompts that `spec` names: `standard`, `quick`, the path of a file, or `hf:org/name[:file-or-split]`.

    A file is JSON lines (.jsonl, .jsonl.gz) or parquet in any format of `prompts.formats`. `org/name` without `hf:`
    works where no local file or folder has that name. `limit` takes prompts in turns over the categories, always the
    same ones. Raises UserError, in one line that says what to do, for everything that a user can get wrong.
    """
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} leaves no prompts; give 1 or more, or leave it out")
    found = _find(spec)
    if limit is None:
        return found
    return PromptSet(name=found.name, prompts=take(found.prompts, limit), source=found.source, license=found.license)


def available() -> dict[str, str]:
    """Name and one-line description of each set that ships with the program."""
    return {name: _described(load(name), about) for name, about in ABOUT.items()}


ABOUT: Mapping[str, str] = {
    "standard": "for numbers to publish",
    "quick": "short ones of the standard set, for a first look or a slow machine",
}


def _find(spec: str) -> PromptSet:
    if spec in ABOUT:
        return _ours(spec)
    if spec.startswith("hf:"):
        return _from_hub(spec.removeprefix("hf:"))
    if (path := _existing(spec)) is not None:
        return PromptSet(name=stem_of(path.name), prompts=read_file(path), source=f"the file {path.name}")
    repo = spec.split(":")[0]
    if hub.split_id(spec) and not repo.endswith((*SUFFIXES, ".json")) and _existing(repo.split("/")[0]) is None:
        return _from_hub(spec)
    raise missing_file(spec, tuple(ABOUT))


def _ours(set_name: str) -> PromptSet:
    prompts = read_file(STANDARD)
    if set_name == "quick":
        by_id = {prompt.id: prompt for prompt in prompts}
        prompts = tuple(by_id[name] for name in QUICK)
    source = "written for this project, nothing taken from other prompt sets"
    return PromptSet(name=set_name, prompts=prompts, source=source, license="that of this project")


def _from_hub(spec: str) -> PromptSet:
    parts = hub.split_id(spec)
    if parts is None:
        raise UserError(f"{spec!r} is no hub id; write hf:org/name or hf:org/name:FILE")
    repo, part = parts
    download = hub.fetch(repo, part)
    return PromptSet(
        name=f"{repo}:{download.file}",
        # The file is often called test-00000-of-00001: the repository's name says more.
        prompts=read_file(download.path, stem=repo.split("/")[1]),
        source=f"{download.file} of the data set {repo} on the Hugging Face hub, revision {download.revision}",
        license=download.license,
    )


def _existing(spec: str) -> Path | None:
    try:
        path = Path(os.path.expanduser(spec))
        return path if spec and path.exists() else None
    except OSError:  # a name too long to be a file, or a folder we may not look into
        return None


def _described(prompts: PromptSet, about: str) -> str:
    two_turn = sum(len(prompt.turns) > 1 for prompt in prompts.prompts)
    return (
        f"{len(prompts.prompts)} prompts in {len(prompts.categories)} categories, "
        f"{two_turn} of them with a second turn; {about}"
    )
