"""What a decoder has to be: the protocol of the one loop, and how methods are found and configured.

Methods come through the entry-point group `harness.methods`, ours by the same door as a stranger's. A method is a
class; its `Options` are a frozen msgspec Struct with defaults, which is also its command line
(`name:option=value:...`, lists with `+`) and its TOML table.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from harness.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from harness.draft import Draft
    from harness.lesson import Trainee
    from harness.results import Cell
    from harness.sampling import Sampler
    from harness.target import Scores, Target
    from harness.trunk import Trunk
    from harness.verify import Accepted, Typical, Verdict

GROUP = "harness.methods"

Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every method's options. Fields need a type and a default."""


class Method:
    """A decoder. Subclasses override `propose`, and what else they need; the defaults draft nothing and keep nothing.

    The loop calls `start` once a sequence, then `propose`, `observe` and `settle` in turn. Nothing here measures,
    prints or reads the environment.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str] = ""
    "paper or other origin"
    Options: ClassVar[type[Options]] = Options
    needs_drafter: ClassVar[bool] = False
    "True where `load` wants trained weights"

    taps: Sequence[int] = ()
    "hidden states that every scoring pass has to give (transformers' numbering; negative from the end)"
    rule: Typical | None = None
    "a lossy acceptance rule"

    @property
    def lossless(self) -> bool:
        """What is promised with these options."""
        return self.rule is None

    @classmethod
    def unsupported(cls, cell: Cell, options: Any) -> str | None:
        """Why this cell cannot run, or None. Called before anything is loaded."""
        return None

    @classmethod
    def for_random_weights(cls, options: Any) -> Any:
        """Options for a model of random weights, which is never sure of anything: an adaptive stop must not ask it."""
        return options

    @classmethod
    def target_weights(cls, options: Any) -> str:
        """`base`, or the name of a drafter that is merged into the target's own weights before anything runs."""
        return "base"

    @classmethod
    def drafter_name(cls, options: Any) -> str:
        """File name, without suffix, of the drafter that these options want; see `harness.drafter`."""
        return cls.name

    @classmethod
    def deltas(cls, drafter: Path, depth: int) -> dict[str, Tensor]:
        """For a method with merged weights: what is added to each parameter of a target of so many layers, by name.

        Raises UserError for a drafter that was trained for another depth.
        """
        raise NotImplementedError(cls.name)

    @classmethod
    def load(cls, target: Target, options: Any, drafter: Path | None, sampler: Sampler) -> Method:
        """Build the method on a loaded target. `drafter` is a safetensors file or a directory, or None."""
        return cls()

    @classmethod
    def trainee(cls, trunk: Trunk, options: Any, vocabulary_V: Tensor | None, seed_ids: Tensor) -> Trainee | None:
        """What `harness train` shall train, or None for nothing. `seed_ids` are ids of real text."""
        return None

    @property
    def reach(self) -> int:
        """Scratch slots needed beyond the committed length: nodes scored, or peeked at, in one round."""
        return 1

    @property
    def drafter_bytes(self) -> int:
        """Memory that the method holds beyond the target's weights and cache."""
        return 0

    def start(self, tokens: Sequence[int], scores: Scores) -> None:
        """A new sequence: the prompt's ids with the first new token last, and the scores of the prompt."""

    def propose(self, tokens: Sequence[int]) -> Draft:
        """Draft what may follow `tokens`; the last of them is pending (not yet in the target's cache)."""
        raise NotImplementedError

    def observe(self, draft: Draft, scores: Scores, verdict: Verdict) -> None:
        """The round is decided: update the drafter's own state on the device, before the host knows the verdict.

        What `propose` and `observe` do on the device in fixed shapes they may hand to `target.call`, so that a runtime
        can capture it; state that outlives the round then lies in tensors made in `load`.
        """

    def settle(self, draft: Draft, accepted: Accepted) -> None:
        """The host knows the verdict: update what is kept there, like the length of a drafter's cache."""


@cache
def installed() -> dict[str, Any]:
    """Entry points by method name, not yet imported."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def find(name: str) -> type[Method]:
    """The method class of this name. Raises UserError with the nearest name."""
    points = installed()
    if name not in points:
        close = difflib.get_close_matches(name, points, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UserError(f"unknown method {name!r}{hint} `python -m harness list` shows all")
    return points[name].load()  # type: ignore[no-any-return]


class Spec(msgspec.Struct, frozen=True):
    """A method with its options, as planned."""

    name: str
    options: dict[str, Any]
    "all of them, defaults filled in"
    label: str
    "as the user wrote it"


def parse(text: str) -> list[Spec]:
    """`s3d:k=4:keep=3+7,eagle` -> specs. Raises UserError naming the option and what it accepts."""
    specs = [parse_one(part.strip()) for part in text.split(",") if part.strip()]
    if not specs:
        raise UserError("no method named: try `--methods s3d,eagle`; `python -m harness list` shows all")
    return specs


def parse_one(text: str) -> Spec:
    name, *pairs = text.split(":")
    given: dict[str, Any] = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{text!r}: option {pair!r} has no value; write `{name}:{pair}=...`")
        if option.replace("-", "_") in given:
            raise UserError(f"{text!r}: option {option!r} is given twice: keep one")
        given[option.replace("-", "_")] = value
    return configure(name, given, label=text)


def configure(name: str, given: Mapping[str, Any], *, label: str | None = None) -> Spec:
    """Check options against the method's own and fill in its defaults. Values may be text (`3+7` for lists)."""
    options = find(name).Options
    fields = {field.encode_name: field for field in msgspec.structs.fields(options)}
    for option in given:
        if option not in fields:
            known = ", ".join(fields) or "it has none"
            raise UserError(f"method {name!r} has no option {option!r}; its options: {known}")
    values = {option: _value(value, fields[option].type) for option, value in given.items()}
    try:
        checked = msgspec.convert(values, options, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        what, _, where = str(error).partition(" - at `$.")
        option = f", option {where.rstrip('`')}" if where else ""
        raise UserError(f"method {name!r}{option}: {what}; `python -m harness list` shows its options") from None
    written = label or ":".join((name, *(f"{option}={_text(value)}" for option, value in given.items())))
    return Spec(name, msgspec.to_builtins(checked), written)


def options_of(spec: Spec) -> Any:
    """The typed options of a spec."""
    return msgspec.convert(spec.options, find(spec.name).Options)


def _value(value: Any, kind: Any) -> Any:
    if not isinstance(value, str):
        return value
    if "tuple" in str(kind) or "list" in str(kind):
        return [part for part in value.split("+") if part]
    return value


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
