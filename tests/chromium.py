"""The system's Chromium, driven by playwright: one browser for a module, a fresh context for a test."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@contextmanager
def browser() -> Iterator[Browser]:
    """Raises AssertionError, with the remedy, where no Chromium is on the PATH and none can be installed."""
    from playwright.sync_api import sync_playwright

    executable = found() or installed()
    assert executable, f"these tests drive a browser: put Chromium on the PATH (one of {', '.join(NAMES)})"
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield running
        running.close()


def found() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def installed() -> str | None:
    """Debian's Chromium, fetched where that needs no password: a container in CI. Test processes take turns."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return None
    with FileLock(Path(tempfile.gettempdir()) / "spec-harness-chromium.lock"):
        if not found():
            for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
                subprocess.run(["apt-get", "-qq", *command], check=False, stdout=subprocess.DEVNULL)
    return found()
