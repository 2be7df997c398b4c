"""The test of sampled text: right rules pass at the stated rate, wrong ones fail, whatever the vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

from harness.distribution import BINS, FALSE_ALARM, FEWEST, p_value, places

V = 50


def rows(count: int, seed: int = 0) -> Tensor:
    """Peaked distributions, half of each row tied at nothing, as top-p leaves it."""
    logits_TV = 2.0 * torch.randn(count, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits_TV[:, V // 2 :] = -torch.inf
    return torch.softmax(logits_TV, -1)


def drawn(p_TV: Tensor, seed: int = 1) -> Tensor:
    return torch.multinomial(p_TV, 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def noise(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_tokens_of_the_target_lie_uniformly() -> None:
    """Kolmogorov-Smirnov on 20,000 places, seeded."""
    p_TV = rows(20_000)
    found = places(p_TV, drawn(p_TV), noise(20_000))
    assert scipy_stats.kstest(found.numpy(), "uniform").pvalue > 0.01


def test_ties_do_not_overlap() -> None:
    """In a flat row token i lies in the i-th of V equal parts."""
    flat_TV = torch.full((V, V), 1 / V, dtype=torch.float64)
    found = places(flat_TV, torch.arange(V), torch.full((V,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(found, (torch.arange(V, dtype=torch.float64) + 0.5) / V)


def test_a_correct_rule_fails_at_the_stated_rate() -> None:
    """4,000 sets of 400 places: 5 % below 0.05 and 0.1 % below FALSE_ALARM, within 3 standard errors; seeded."""
    rng = np.random.default_rng(0)
    found = np.array([p_value(rng.random(400)) for _ in range(4000)])
    assert 0.0397 <= (found < 0.05).mean() <= 0.0603
    assert (found < FALSE_ALARM).mean() <= 0.0025


def with_the_bug(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """The best token of q, accepted with min(1, p / q) as though it had been drawn from q."""
    best_T = q_TV.argmax(-1)
    chance_T = (p_TV / q_TV).gather(-1, best_T[:, None])[:, 0].clamp(max=1.0)
    rest_TV = (p_TV - q_TV).clamp_min(0.0)
    rest_TV = rest_TV / rest_TV.sum(-1, keepdim=True)
    accepted_T = torch.rand(len(p_TV), generator=torch.Generator().manual_seed(3), dtype=torch.float64) < chance_T
    return torch.where(accepted_T, best_T, drawn(rest_TV))


def test_argmax_drafts_scored_with_their_softmax_are_caught_in_500_tokens() -> None:
    p_TV = rows(500)
    q_TV = torch.softmax(
        p_TV.clamp_min(1e-12).log() + torch.randn(500, V, generator=torch.Generator().manual_seed(4)), -1
    )
    assert p_value(places(p_TV, with_the_bug(p_TV, q_TV), noise(500)).tolist()) < FALSE_ALARM


def test_another_temperature_is_caught() -> None:
    p_TV = rows(1000)
    cold_TV = p_TV**1.4 / (p_TV**1.4).sum(-1, keepdim=True)
    assert p_value(places(p_TV, drawn(cold_TV), noise(1000)).tolist()) < FALSE_ALARM


def test_too_few_tokens_are_refused() -> None:
    assert FEWEST == 10 * BINS
    with pytest.raises(ValueError, match="too few"):
        p_value([0.5] * (FEWEST - 1))
