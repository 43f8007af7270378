"""Choose the next token: the most likely one, or one drawn at random.

Temperature, top-k, top-p, min-p and the repetition penalty work as in transformers' processors, but
each row of a batch has its own values. The values are in tensors on the device, so one CUDA graph
serves rows with different values. To draw a token, Gumbel noise is added to the scores, and the
token with the largest sum is chosen. This chooses each token with its probability (Gumbel 1954;
Maddison et al. 2014, arXiv:1411.0030).

The noise is computed from a hash of the row's seed, the token's position and the token's id, so
there is no generator state. An answer does not depend on the other prompts in its batch, or on the
use of CUDA graphs. On another device, only rounding errors can change the answer.

B rows, V vocabulary, S positions, P values of a Sampling.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """The sampling options of a row.

    temperature 0 is greedy: it always chooses the most likely token. A temperature below COLDEST is
    greedy too, because dividing logits by it could overflow. The defaults of the other options turn
    these options off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    def values(self) -> list[float]:
        """The P values, in the order in which `choose` reads them. A greedy row has no noise and no
        filters."""
        if self.greedy:
            return [1, 0, 0, math.inf, -math.inf, self.repetition_penalty]
        least = math.log(self.min_p) if self.min_p else -math.inf
        top_p = self.top_p if self.top_p < 1 else math.inf  # a rounded sum may exceed 1
        return [self.temperature, 1, self.top_k, top_p, least, self.repetition_penalty]


VALUES = len(Sampling().values())


class Needs(NamedTuple):
    """The parts of `choose` that at least one row of a batch needs. Other parts do not run."""

    penalty: bool
    noise: bool
    filters: bool

    @classmethod
    def of(cls, samplings: Iterable[Sampling]) -> "Needs":
        samplings = list(samplings)
        drawn = [s for s in samplings if not s.greedy]
        return cls(any(s.repetition_penalty != 1 for s in samplings), bool(drawn),
                   any(s.top_k or s.top_p < 1 or s.min_p for s in drawn))


def choose(logits_BV, values_PB, needs: Needs, history_BS, place_B, seed_B) -> torch.Tensor:
    """The next token of each row, [B]. The host does not wait for the GPU here.

    logits_BV: fp32, computed from each row's last token, whose position is place_B. values_PB: the
    Sampling.values of each row. history_BS: the tokens so far. Positions after these tokens contain
    the row's first token. history_BS is read only if needs.penalty is True.
    """
    temperature_B, noise_B, top_k_B, top_p_B, least_B, penalty_B = values_PB
    scores_BV = logits_BV
    if needs.penalty:
        scores_BV = penalised(scores_BV, history_BS, penalty_B)
    if not needs.noise:
        return scores_BV.argmax(-1)
    scores_BV = scores_BV / temperature_B[:, None]
    if needs.filters:
        scores_BV = filtered(scores_BV, top_k_B, top_p_B, least_B)
    return (scores_BV + noise_B[:, None] * gumbel(seed_B, place_B, scores_BV.shape[1])).argmax(-1)


def penalised(scores_BV, history_BS, penalty_B) -> torch.Tensor:
    """The scores, with lower scores for tokens of the history. A positive score is divided by the
    penalty, and a negative score is multiplied by it (Keskar et al. 2019, arXiv:1909.05858)."""
    known_BS, penalty_B1 = scores_BV.gather(1, history_BS), penalty_B[:, None]
    known_BS = torch.where(known_BS < 0, known_BS * penalty_B1, known_BS / penalty_B1)
    return scores_BV.scatter(1, history_BS, known_BS)


def filtered(scores_BV, top_k_B, top_p_B, least_B) -> torch.Tensor:
    """The scores, with -inf for each excluded token. The order is top-k, then top-p, then min-p.

    Each filter keeps all tokens from a certain score upwards, so one threshold per row is enough.
    top_k_B: 0 keeps all tokens. least_B: the logarithm of min-p.
    """
    sorted_BV = scores_BV.sort(descending=True).values
    last_B = torch.where(top_k_B == 0, scores_BV.shape[1], top_k_B).clamp(max=scores_BV.shape[1])
    threshold_B1 = sorted_BV.gather(1, last_B[:, None].long() - 1)
    p_BV = sorted_BV.where(sorted_BV >= threshold_B1, -math.inf).softmax(-1)
    likelier_BV = p_BV.cumsum(-1) - p_BV  # the probability of all likelier tokens
    kept_BV = (likelier_BV < top_p_B[:, None]) & (sorted_BV >= threshold_B1)
    threshold_B1 = sorted_BV.where(kept_BV, math.inf).amin(-1, keepdim=True)
    threshold_B1 = torch.maximum(threshold_B1, sorted_BV[:, :1] + least_B[:, None])
    return scores_BV.where(scores_BV >= threshold_B1, -math.inf)


def gumbel(seed_B, place_B, vocabulary: int) -> torch.Tensor:
    """Gumbel noise [B, V] in fp32, which depends only on seed, position and token."""
    token_V = torch.arange(vocabulary, device=seed_B.device)
    row_B = mixed(mixed(seed_B) + place_B)
    bits_BV = mixed(row_B[:, None] + token_V * GOLDEN) >> 41 & (1 << 23) - 1
    uniform = (bits_BV.float() + 0.5) / (1 << 23)  # strictly between 0 and 1
    return -torch.log(-torch.log(uniform))


GOLDEN, FIRST, SECOND = (value - (1 << 64) for value in (
    0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as negative int64


def mixed(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's hash of int64 values (Steele et al. 2014, doi:10.1145/2714064.2660195). torch's
    right shift copies the sign bit. The masks replace these copies by zeros."""
    z = z + GOLDEN
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * FIRST
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * SECOND
    return z ^ (z >> 31 & (1 << 33) - 1)
