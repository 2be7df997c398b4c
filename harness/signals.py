"""What a process does where somebody asks it to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPS = ("SIGTERM", "SIGHUP")
"a polite request to end, and a closed terminal: what Ctrl-C is, where a system has them"


@contextmanager
def handled(names: tuple[str, ...], handler: Callable[..., None]) -> Iterator[None]:
    """Handle these signals so, in the main thread, which alone may have handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for name in names if (number := getattr(signal, name, None))}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
