"""Choose the next token: the most likely one, or one drawn at random.

Temperature, top-k, top-p, min-p and the repetition penalty are transformers' own processors. A
token is drawn as the argmax of the scores plus Gumbel noise, which picks each token with its
probability (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030).

The noise is a hash of the row's seed, the token's position and its id, so no generator state must
be kept. An answer is the same alone and in a batch, with and without CUDA graphs, and on any device
up to rounding.

B rows, V vocabulary, S positions.
"""

from dataclasses import dataclass

import torch

COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy: always the most likely token. So is a temperature so small that
    dividing logits by it would overflow. Off: top_k 0, top_p 1, min_p 0, repetition_penalty 1."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST


class Sampler:
    """Chooses the tokens of a batch; nothing in it waits for the GPU."""

    def __init__(self, sampling: Sampling):
        from transformers.generation import logits_process as hf

        self.greedy, self.needs_history = sampling.greedy, sampling.repetition_penalty != 1
        self.processors = hf.LogitsProcessorList()
        if self.needs_history:
            self.processors.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if self.greedy:
            return
        if sampling.temperature != 1:
            self.processors.append(hf.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self.processors.append(hf.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.processors.append(hf.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self.processors.append(hf.MinPLogitsWarper(sampling.min_p))

    def choose(self, logits_BV, history_BS, place_B, seed_B) -> torch.Tensor:
        """The next token of each row, [B].

        logits_BV: fp32, of the tokens at the positions place_B. history_BS: the tokens so far, with
        later positions filled with the row's first token; None where no processor needs it.
        """
        scores = self.processors(history_BS, logits_BV) if self.processors else logits_BV
        if not self.greedy:
            scores = scores + gumbel(seed_B, place_B, scores.shape[1])
        return scores.argmax(-1)


def gumbel(seed_B, place_B, vocabulary: int) -> torch.Tensor:
    """Gumbel noise [B, V] in fp32, a function of (seed, position, token) alone."""
    token_V = torch.arange(vocabulary, device=seed_B.device)
    row_B = mixed(mixed(seed_B) + place_B)
    bits_BV = mixed(row_B[:, None] + token_V * GOLDEN) >> 41 & (1 << 23) - 1
    uniform = (bits_BV.float() + 0.5) / (1 << 23)  # strictly between 0 and 1
    return -torch.log(-torch.log(uniform))


GOLDEN, FIRST, SECOND = (value - (1 << 64) for value in (
    0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as int64


def mixed(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's hash of int64 (Steele et al. 2014, doi:10.1145/2714064.2660195). The masks make
    torch's shifts, which copy the sign bit, shift zeros in."""
    z = z + GOLDEN
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * FIRST
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * SECOND
    return z ^ (z >> 31 & (1 << 33) - 1)
