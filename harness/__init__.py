"""Speculative decoders, measured: speed, memory, faithfulness. `harness.run(...)` is the command line for notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from harness.metrics import Row

__all__ = ["Run", "open_run", "run"]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    directory: Path

    def trials(self) -> pd.DataFrame:
        """One row a trial."""
        from harness.metrics import trial_frame
        from harness.results import read_run

        return trial_frame(read_run(self.directory))

    def summary(self) -> list[Row]:
        """One row a cell."""
        from harness.metrics import summary
        from harness.results import read_run

        return summary(read_run(self.directory))

    def report(self) -> Path:
        """Write the page anew; its path."""
        from harness import cli

        return cli.write_report(self.directory)


def run(methods: str | list[str | dict[str, Any]] | None = None, **options: Any) -> Run:
    """Measure, and give the run: `run("s3d,eagle", bits=8, prompts="quick", limit=2)`.

    The options are those of the command line, with underscores; None means the default. Raises UserError.
    """
    from harness import cli

    given = {"methods": methods} | options
    return Run(cli.measure({name: value for name, value in given.items() if value is not None}))


def open_run(directory: Path | str) -> Run:
    """A run that is already there. Raises UserError where it is none."""
    from harness.results import read_run

    return Run(read_run(directory).directory)


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("spec-harness")
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
