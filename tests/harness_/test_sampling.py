"""Temperature, top-p and draws."""

from __future__ import annotations

import pytest
import torch
from bench import steady
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from harness.sampling import Sampler

FALSE_ALARM = 1e-6


def sampler(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> Sampler:
    return Sampler(temperature, top_p, torch.Generator().manual_seed(seed))


def nucleus(p: list[float], top_p: float) -> list[float]:
    """The slow way: take tokens from the likeliest down until their mass reaches top_p."""
    kept, mass = [0.0] * len(p), 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if mass >= top_p:
            break
        kept[token] = p[token]
        mass += p[token]
    return [share / mass for share in kept]


@steady
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9, unique=True), st.floats(0.05, 1.0))
def test_top_p_keeps_the_smallest_set_whose_mass_reaches_it(weights: list[int], top_p: float) -> None:
    p = [weight / sum(weights) for weight in weights]
    logits = torch.tensor([p], dtype=torch.float64).log()
    found = sampler(top_p=top_p).distribution(logits)[0]
    torch.testing.assert_close(found, torch.tensor(nucleus(p, top_p), dtype=torch.float64))


def test_top_p_takes_the_token_that_crosses_the_line_and_stops_on_it() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    assert sampler(top_p=0.5).distribution(logits)[0].tolist() == [1, 0, 0, 0]
    assert (sampler(top_p=0.51).distribution(logits)[0] > 0).tolist() == [True, True, False, False]
    assert sampler(top_p=1e-6).distribution(logits)[0].tolist() == [1, 0, 0, 0]


@steady
@given(st.floats(0.2, 3.0))
def test_temperature_divides_logits(temperature: float) -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0], [5.0, 5.0, -5.0]], dtype=torch.float64)
    expected = torch.softmax(logits / temperature, dim=-1)
    torch.testing.assert_close(sampler(temperature).distribution(logits), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_probabilities_are_never_half_precision(dtype: torch.dtype) -> None:
    p_MV = sampler(top_p=0.9).distribution(torch.randn(2, 50).to(dtype))
    assert p_MV.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(p_MV.sum(-1), torch.ones(2, dtype=p_MV.dtype))


def test_draws_follow_the_distribution_row_by_row() -> None:
    """Chi-square over 40,000 draws a row; false-alarm rate 1e-6 a row."""
    p_MV = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.01, 0.09, 0.2, 0.7]])
    drawn = sampler().draw(p_MV.repeat(40_000, 1)).view(-1, 2)
    for row in range(2):
        counts = torch.bincount(drawn[:, row], minlength=4)
        possible = p_MV[row] > 0
        assert counts[~possible].sum() == 0
        expected = (p_MV[row].double() / p_MV[row].double().sum() * len(drawn))[possible]
        assert chisquare(counts[possible], expected).pvalue > FALSE_ALARM


def test_a_seed_gives_the_same_draws() -> None:
    p_MV = torch.full((30, 9), 1 / 9)
    assert torch.equal(sampler(seed=4).draw(p_MV), sampler(seed=4).draw(p_MV))
    assert not torch.equal(sampler(seed=4).draw(p_MV), sampler(seed=5).draw(p_MV))


def test_greedy_picks_the_likeliest() -> None:
    assert Sampler().greedy
    assert Sampler().pick(torch.tensor([[0.0, 3.0, 1.0], [9.0, 3.0, 1.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0), (1.0, 1.5)])
def test_settings_that_mean_nothing_are_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(ValueError, match=r"temperature|top-p"):
        Sampler(temperature, top_p)
