"""A side of decode.py in its own process: this engine, or transformers' generate with PEFT.

Both sides load the same checkpoint in NF4 and the same adapter. They generate the same number of
tokens greedily after the same random prompts. An end token does not end an answer early.
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch

from bench.measure import context_gib
from bench.process import now, serve
from bench.random_data import random_rows
from bench.sides import transformers_base
from phogpt_raw.cards import DTYPES
from phogpt_raw.decode.engine import Engine
from phogpt_raw.model.adapters import load_adapters, new_adapters
from phogpt_raw.model.weights import PINNED_IDS, load_base

NEVER = -1  # an end id that is no token's id, so that answers do not end early
STEPS = 5  # number of decoding steps that the profiler records


class Ours:
    """This engine. Its steps run as CUDA graphs."""

    def __init__(self, folder: Path, dtype: torch.dtype, rank: int):
        if not (folder / "adapters").exists():
            model, _ = load_base(str(folder), dtype=dtype, device="cuda")
            new_adapters(model, rank=rank, alpha=2 * rank).save(folder / "adapters")
            del model
            torch.cuda.empty_cache()
        self.model, _ = load_base(str(folder), dtype=dtype, device="cuda")
        load_adapters(self.model, folder / "adapters", trainable=False)
        self.context_gib = context_gib()

    def run(self, prompt: int, rows: int, new: int) -> dict:
        """Answer `rows` prompts of `prompt` tokens with `new` tokens each.

        Returns {"ends": seconds from the start to the end of each step, "fused": whether the fused
        kernels were used}. At the end of the first step every row has its first token.
        """
        prompts = random_rows(self.model.config.vocab_size, rows, prompt, seed=0)
        began, ends = now(), []
        with Engine(self.model, eos_id=NEVER, pad_id=PINNED_IDS["pad"], rows=rows) as engine:
            for key, ids in enumerate(prompts):
                engine.add(key, ids, new)
            written = 0
            for token in engine.run():
                written += token.id is not None
                if token.id is not None and written % rows == 0:
                    ends.append(time.perf_counter() - began)
            fast = engine.fast is not None
        return {"ends": ends, "fused": fast}

    def kernels(self, prompt: int, rows: int) -> dict:
        """{name of a kernel: [seconds, number of calls]} of one decoding step, as a CUDA graph."""
        from torch.profiler import ProfilerActivity, profile

        prompts = random_rows(self.model.config.vocab_size, rows, prompt, seed=0)
        with Engine(self.model, eos_id=NEVER, pad_id=PINNED_IDS["pad"], rows=rows) as engine:
            for key, ids in enumerate(prompts):
                engine.add(key, ids, 100)
            engine.admit()
            for _ in range(3):
                engine.launch()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(STEPS):
                    engine.launch()
                torch.cuda.synchronize()
        return {event.key: [event.self_device_time_total / 1e6 / STEPS, event.count // STEPS]
                for event in seen.key_averages() if event.self_device_time_total}

    def forward_s(self, prompt: int) -> float:
        """Seconds of a training step's forward over `prompt` tokens. The forward runs seven times;
        the result is the median of the last five."""
        [ids] = random_rows(self.model.config.vocab_size, 1, prompt, seed=0)
        ids_BL, times = torch.tensor([ids], device="cuda"), []
        for p in self.model.parameters():
            p.requires_grad_(p.dtype == torch.float32)  # only the adapters are in fp32
        for _ in range(7):
            began = now()
            self.model(ids_BL)
            times.append(now() - began)
        for p in self.model.parameters():
            p.requires_grad_(False)
        return sorted(times[2:])[2]

    def release(self) -> None:
        pass


class Transformers:
    """transformers' MPT with bitsandbytes' linear layers and PEFT's adapter, set up as users of
    these libraries usually do."""

    def __init__(self, folder: Path, dtype: torch.dtype, rank: int):
        from peft import PeftModel

        model = transformers_base(folder, dtype)
        model.config.use_cache = True
        self.context_gib = context_gib()
        self.model = PeftModel.from_pretrained(model, folder / "adapters").eval()

    def run(self, prompt: int, rows: int, new: int, cache: str | None = None) -> dict:
        """Like Ours.run, with transformers' `generate`. cache: generate's argument
        cache_implementation; None: the default of generate."""
        from transformers import StoppingCriteria

        class Ends(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                ends.append(now() - began)
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        ids = torch.tensor(list(random_rows(self.model.config.vocab_size, rows, prompt, seed=0)),
                           device="cuda")
        more = {} if cache is None else {"cache_implementation": cache}
        began, ends = now(), []
        self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=new, min_new_tokens=new, eos_token_id=None,
                            pad_token_id=PINNED_IDS["pad"], stopping_criteria=[Ends()], **more)
        return {"ends": ends}

    def release(self) -> None:
        pass


def work(side, **order) -> dict:
    """Run a side after a warm-up run, and return its measurements.

    first_s: seconds until every row has its first token. step_s: median seconds of the later steps.
    whole_s: seconds of the whole run. tokens_per_s: tokens of all rows per second, in the time
    after first_s. whole_tokens_per_s: tokens of all rows per second, in the whole run.
    """
    if order.pop("forward", False):
        return {"forward_s": side.forward_s(**order)}
    if order.pop("kernels", False):
        return {"kernels_s": side.kernels(**order)}
    side.run(**{**order, "new": min(order["new"], 8)})
    torch.cuda.reset_peak_memory_stats()
    found = side.run(**order)
    ends, rows = found.pop("ends"), order["rows"]
    steps = sorted(after - before for before, after in pairwise(ends))
    return found | {
        "first_s": ends[0], "step_s": steps[len(steps) // 2], "whole_s": ends[-1],
        "tokens_per_s": rows * len(steps) / (ends[-1] - ends[0]),
        "whole_tokens_per_s": rows * len(ends) / ends[-1]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("ours", "transformers"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("rank", type=int)
    options = parser.parse_args()
    kind = Ours if options.side == "ours" else Transformers
    serve(lambda: kind(options.folder, DTYPES[options.dtype], options.rank), work)


if __name__ == "__main__":
    main()
