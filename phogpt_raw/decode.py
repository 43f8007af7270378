"""One token after another: the prompt in one pass, then a token a pass through the cache.

Several prompts go together, padded on the left so that all of them end where the answers begin.
The padding is a document of its own, so an answer is what it would be alone.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from phogpt_raw.model.phogpt import PhoGPT


@dataclass(frozen=True)
class Answer:
    """`ids` without `</s>`; `stopped` where the model ended by itself."""

    ids: list[int]
    stopped: bool


@contextmanager
def evaluating(model: PhoGPT):
    """Without gradients and dropout; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def answer(
    model: PhoGPT,
    prompts: list[list[int]],
    *,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    on_token: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Greedy answers to prompts (token ids), in order; `on_token` sees the first one's tokens."""
    device = model.head.device
    rows, longest = len(prompts), max(map(len, prompts))
    ids_BL = torch.full((rows, longest), pad_id)
    doc_BL = torch.zeros(rows, longest, dtype=torch.long)
    for n, prompt in enumerate(prompts):
        ids_BL[n, longest - len(prompt) :] = torch.tensor(prompt)
        doc_BL[n, longest - len(prompt) :] = 1
    cache = model.new_cache(rows, longest + max_new_tokens)
    written = [[] for _ in prompts]
    going = torch.ones(rows, dtype=torch.bool)
    ids_BL, doc_BL = ids_BL.to(device), doc_BL.to(device)
    with evaluating(model):
        for _ in range(max_new_tokens):
            hidden_BD = model(ids_BL, doc_BL, cache)[:, -1]
            chosen_B = model.logits(hidden_BD).float().argmax(-1)
            for n, token in enumerate(chosen_B.tolist()):
                if not going[n]:
                    continue
                if token == eos_id:
                    going[n] = False
                else:
                    written[n].append(token)
                    if on_token and n == 0:
                        on_token(token)
            if not going.any():
                break
            ids_BL, doc_BL = chosen_B[:, None], doc_BL[:, -1:]
    return [Answer(ids, not going[n]) for n, ids in enumerate(written)]
