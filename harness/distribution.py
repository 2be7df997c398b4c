"""Is sampled text drawn from the target's own distribution? A test with a p-value, whatever the vocabulary.

Every token is placed by the target's own mass of the tokens that are likelier after the same text, plus a uniform share
of its own mass. If tokens are drawn from p these places are independent and uniform between 0 and 1 (the probability
integral transform), and a chi-square test of their histogram says how likely what was seen is. A rule that prefers
likely tokens, or unlikely ones, piles places up at one end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats as scipy_stats
from torch import Tensor

from harness.sampling import Sampler
from harness.target import Target

BINS = 20
FALSE_ALARM = 1e-3
"how often a correct method is called DIVERGED"
FEWEST = 10 * BINS
"places for the chi-square test to hold"


def places(p_TV: Tensor, tokens_T: Tensor, uniform_T: Tensor) -> Tensor:
    """Where each token lies in the mass of its row, likeliest tokens first; ties in the order of their ids."""
    own_T1 = p_TV.gather(-1, tokens_T[:, None])
    earlier_V = torch.arange(p_TV.shape[-1], device=p_TV.device)
    before_TV = (p_TV > own_T1) | ((p_TV == own_T1) & (earlier_V < tokens_T[:, None]))
    return (p_TV * before_TV).sum(-1) + uniform_T * own_T1[:, 0]


def p_value(places_N: Sequence[float]) -> float:
    """Of places that should be uniform. Raises ValueError for fewer than FEWEST."""
    if len(places_N) < FEWEST:
        raise ValueError(f"{len(places_N)} sampled tokens are too few for a test: add prompts, tokens or --samples")
    counts, _ = np.histogram(np.clip(places_N, 0.0, 1.0), bins=BINS, range=(0.0, 1.0))
    return float(scipy_stats.chisquare(counts).pvalue)


@torch.inference_mode()
def placed(
    target: Target, prompt: Sequence[int], text: Sequence[int], sampler: Sampler, noise: torch.Generator
) -> list[float]:
    """Places of a text's tokens but the first, which no method drafts, by the target's own pass over all of it."""
    ids_1T = torch.tensor([[*prompt, *text]], device=target.device)
    with target.lent() as model:
        logits_TV = model(ids_1T, use_cache=False).logits[0, len(prompt) : -1]
    p_TV = sampler.distribution(logits_TV).double().cpu()
    uniform_T = torch.rand(len(text) - 1, generator=noise, dtype=torch.float64)
    found: list[float] = places(p_TV, torch.tensor(list(text[1:])), uniform_T).tolist()
    return found
