"""A stranger's package with decoders that are good, refuse, fail, die or dawdle, found by its entry points alone."""

from __future__ import annotations

from pathlib import Path

CODE = '''
"""Drafts the last token again; and decoders with which everything goes wrong that can."""

import os
import signal
import time

import torch

from harness.draft import nothing, point_chain
from harness.method import Method, Options


class EchoOptions(Options, frozen=True, kw_only=True):
    gamma: int = 2


class Echo(Method):
    name = "echo"
    summary = "the last token again"
    Options = EchoOptions

    def __init__(self, target, options):
        self.target, self.options = target, options

    @classmethod
    def load(cls, target, options, drafter, sampler):
        return cls(target, options)

    @property
    def reach(self):
        return 1 + self.options.gamma

    def propose(self, tokens):
        return point_chain(tokens[-1:] * self.options.gamma, self.target.device)


class Greedy(Echo):
    name = "greedy-for-memory"

    def propose(self, tokens):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")


class Refuses(Echo):
    name = "refuses"

    @classmethod
    def load(cls, target, options, drafter, sampler):
        raise ValueError("gamma must be odd: choose 3")


class Unfit(Echo):
    name = "unfit"

    @classmethod
    def unsupported(cls, cell, options):
        return f"cannot run in {cell.bits} bits"


class Buggy(Echo):
    name = "buggy"

    def start(self, tokens, scores):
        self.rounds = 0

    def propose(self, tokens):
        self.rounds += 1
        if len(tokens) > 14 and self.rounds > 1:
            raise RuntimeError("index out of luck")
        return nothing(self.target.device)


class Dies(Echo):
    name = "dies"

    def propose(self, tokens):
        os.kill(os.getpid(), signal.SIGKILL)


class Dawdles(Echo):
    name = "dawdles"

    def propose(self, tokens):
        if len(tokens) > 14:
            time.sleep(60)
        return nothing(self.target.device)
'''
ENTRY_POINTS = """[harness.methods]
echo = stranger_decoders:Echo
greedy-for-memory = stranger_decoders:Greedy
refuses = stranger_decoders:Refuses
unfit = stranger_decoders:Unfit
buggy = stranger_decoders:Buggy
dies = stranger_decoders:Dies
dawdles = stranger_decoders:Dawdles
"""


def install(directory: Path) -> Path:
    """Write the package, as pip would leave it, into a directory for PYTHONPATH."""
    info = directory / "stranger_decoders-1.0.dist-info"
    info.mkdir(parents=True)
    (directory / "stranger_decoders.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger-decoders\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return directory
