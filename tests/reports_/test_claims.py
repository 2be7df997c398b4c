"""Published figures beside a run: settings come first, and only like settings are judged."""

from __future__ import annotations

import json

import pytest
from factory import cell, run, trial

from harness import cli
from harness.errors import UserError
from harness.metrics import summary
from harness.results import Run
from reports import claims
from reports.claims import Claim, Figure, Source

HERE = {"model": "toy", "device": "cuda", "bits": "16", "dtype": "float32", "sampling": "greedy", "batch": "1"}
HERE |= {"runtime": "eager", "prompts": "toy", "new tokens": "128"}


def of(*more: tuple[str, str, float], rounds: int = 3) -> Run:
    """`ar` and `eagle` (a chain; twice as fast, but for a little noise) in 16 bits, and what else is asked for."""
    cells = [("ar", "16", 0.1), ("eagle", "16", 0.15), *more]
    written = {"ar": [1] * 6}
    trials = [
        trial(
            cell(name, bits=bits, options={"nodes": 0}),
            written.get(name, [3, 3]),
            pace + index / 1e4,
            round=index,
        )
        for index in range(rounds)
        for name, bits, pace in cells
    ]
    return run(*trials)


def compared(run: Run, *figures: Figure, **settings: str) -> list[Claim]:
    stated = {
        name: value
        for name, value in (HERE | {key.replace("_", " "): v for key, v in settings.items()}).items()
        if value
    }
    return claims.compare(run, summary(run), [Source("a paper", "somewhere", stated, figures)])


def test_every_published_figure_has_a_source_and_a_number() -> None:
    sources = claims.published()
    assert {"Spec-Bench", "EAGLE", "Medusa", "S3D"} <= {source.title.split()[0].rstrip(",") for source in sources}
    for source in sources:
        assert source.where
        assert set(source.settings) <= set(claims.SETTINGS)
        for figure in source.figures:
            assert figure.speedup or figure.tau or figure.ratio


def test_like_settings_are_judged_by_the_interval() -> None:
    figures = [Figure(method="eagle", name=str(value), speedup=value) for value in (2.0, 3.0)]
    (claim,) = compared(of(), *figures, Figure(method="eagle", name="range", speedup=(1.0, 5.0)))
    assert claim.differs == ()
    assert [claim.judged(one) for one in claim.besides] == ["agrees", "DIFFERS", "agrees"]
    (one_round,) = compared(of(rounds=1), *figures)
    assert [one_round.judged(one) for one in one_round.besides] == ["no interval"] * 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": "larger"}, "model: toy here, larger there"),
        ({"device": "A100"}, "device: cuda here, A100 there"),
        ({"bits": "int8"}, "bits: 16 here, int8 there"),
        ({"prompts": "others"}, "prompts: toy here, others there"),
        ({"new_tokens": ""}, "new tokens: 128 here, not stated there"),
    ],
)
def test_unlike_or_unstated_settings_are_named_and_nothing_is_judged(settings: dict[str, str], told: str) -> None:
    (claim,) = compared(of(), Figure(method="eagle", name="EAGLE", speedup=9.0), **settings)
    assert claim.differs == (told,)
    assert claim.judged(claim.besides[0]) == "other settings"


def test_a_context_that_was_filled_up_is_a_setting() -> None:
    filled = run(
        *(trial(cell(name, context=512), committed) for name, committed in (("ar", [1] * 6), ("eagle", [3, 3])))
    )
    (claim,) = compared(filled, Figure(method="eagle", name="EAGLE", speedup=9.0), bits="", dtype="", runtime="")
    assert "context: 512 tokens here, not stated there" in claim.differs
    (claim,) = compared(of(), Figure(method="eagle", name="EAGLE", speedup=9.0))
    assert not any("context" in line for line in claim.differs)


def test_a_chain_is_not_judged_by_a_trees_figures() -> None:
    (claim,) = compared(of(), Figure(method="eagle", name="EAGLE", tree="tree", tau=3.58))
    assert claim.besides[0].differs == ("draft: a chain here, a tree there",)
    assert claim.judged(claim.besides[0]) == "other settings"


def test_a_ratio_is_of_two_methods_in_their_own_bits() -> None:
    figure = Figure(method="s3d", bits="16", name="S3D / EAGLE", ratio=(1.4, 2.0), to="eagle", to_bits="int8")
    (claim,) = compared(of(("s3d", "16", 0.1), ("eagle", "int8:t6", 0.15), ("s3d", "nf4", 0.1)), figure)
    (one,) = claim.besides
    assert one.here.value == pytest.approx(1.5, rel=1e-2)
    assert one.kind == "speed over eagle"


def test_a_run_that_nobody_has_published_on_says_so() -> None:
    with pytest.raises(UserError, match="no published figure"):
        compared(run(trial(cell("ar"))), Figure(method="eagle", name="EAGLE", tau=3.58))


def test_the_command_line_names_settings_before_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claims", "docs/quick-cpu"]) == 0
    shown = capsys.readouterr().out
    source = shown.split("Spec-Bench leaderboard")[1]
    assert source.index("device: Intel") < source.index("speed-up 2.10")
    assert "\x1b" not in shown
    assert cli.main(["claims", "docs/quick-cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told[0]["figures"][0]["published"] == 2.1
    assert all(figure["judged"] == "other settings" for source in told for figure in source["figures"])
