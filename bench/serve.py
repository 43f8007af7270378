"""Bench of the server: tokens per second of HTTP clients, compared with the engine alone.

    python bench/serve.py --model 7b5 --save   on a GPU: random weights
    python bench/serve.py --model nano         on any computer

First the engine is measured without a server: it answers as many prompts as there are clients, all
in one batch. Then the server is measured: `generate.py --serve` runs in a separate process with the
same weights and adapter, and each client sends one of the prompts and streams its answer. Before
each of the two measurements, a warm-up run captures the CUDA graphs. This run is not counted.

Tokens per second are the generated tokens of all answers, divided by a time that includes reading
the prompts. The server's time until the first token is measured in two situations. In the first
situation only one client asks, and the server's time is compared with the engine's time for one
prompt. In the second situation the server is already generating the answers of all other clients.
"""

import http.client
import json
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench import report, results
from bench.command_line import MOST_TOKENS, as_in_train, within
from bench.random_data import random_rows
from bench.server import Server
from bench.sides import write_random_checkpoint
from bench.simulated import check_fits
from phogpt_raw.cards import DTYPES, this_card
from phogpt_raw.command_line import Parser
from phogpt_raw.config import Config
from phogpt_raw.decode.engine import Engine
from phogpt_raw.model.adapters import load_adapters, new_adapters
from phogpt_raw.model.phogpt import PUBLISHED
from phogpt_raw.model.weights import find_folder, load_base, read_config
from phogpt_raw.refusal import exits_cleanly
from phogpt_raw.show.console import out

TURNS = 5  # number of times that each value is measured; the result is the median


def prepare(folder: Path, options) -> str:
    """Write the checkpoint and the adapter that the engine and the server load. Returns the name by
    which the engine and the server load the model.

    For nano only the adapter is written, because nano's checkpoint exists already.
    """
    model = options.model
    if model in PUBLISHED:
        model = str(folder / "base")
        write_random_checkpoint(folder / "base", PUBLISHED[options.model])
        widen(folder / "base" / "tokenizer.json", PUBLISHED[options.model].vocab_size)
    base, _ = load_base(model, dtype=DTYPES[options.dtype], device="cpu", nf4=False)
    new_adapters(base, rank=options.rank, alpha=2 * options.rank).save(folder / "adapter")
    return model


def widen(file: Path, vocabulary: int) -> None:
    """Add tokens to nano's tokenizer, to have a token for every row of a larger embedding.

    A model with random weights can generate the id of any row. With the added tokens, every id has
    a text, so the server must send text for each generated token.
    """
    content = json.loads(file.read_text("utf-8"))
    known = content["model"]["vocab"]
    known |= {f"Ġt{n}": n for n in range(len(known), vocabulary)}
    file.write_text(json.dumps(content), "utf-8")


def engine_side(model: str, folder: Path, options) -> dict:
    """Measure the engine without a server: tokens/s while it answers one prompt per client in one
    batch, and seconds to the first token of a single prompt."""
    phogpt, tokenizer = load_base(model, dtype=DTYPES[options.dtype])
    load_adapters(phogpt, folder / "adapter", trainable=False)
    with Engine(phogpt, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
                rows=options.clients) as engine:
        prompts = prompts_of(options)

        def run(prompts, new) -> tuple[float, float, int]:
            """Return (seconds to the first token, seconds in all, number of generated tokens)."""
            began, first, tokens = time.perf_counter(), None, 0
            for key, prompt in enumerate(prompts):
                engine.add(key, prompt, new)
            for token in engine.run():
                first = first or time.perf_counter() - began
                tokens += token.id is not None
            return first, time.perf_counter() - began, tokens

        run(prompts, options.new)
        whole = [run(prompts, options.new) for _ in range(TURNS)]
        alone = [run(prompts[:1], 2)[0] for _ in range(TURNS)]
    return {"tokens_per_s": median(tokens / seconds for _, seconds, tokens in whole),
            "first_s": median(alone)}


def server_side(model: str, folder: Path, options) -> dict:
    """Measure the server: tokens/s of all clients, and seconds to the first token."""
    prompts = prompts_of(options)
    with Server("--model", model, "--adapter", f"bench={folder / 'adapter'}", "--dtype",
                options.dtype, "--slots", options.clients) as server, \
            ThreadPoolExecutor(options.clients) as clients:

        def run(prompts, new) -> tuple[float, int, list[float]]:
            """Return (seconds in all, number of tokens, seconds to each client's first token)."""
            began = time.perf_counter()
            done = list(clients.map(lambda prompt: ask(server.port, prompt, new), prompts))
            return time.perf_counter() - began, sum(tokens for _, tokens in done), \
                [first for first, _ in done]

        run(prompts, options.new)
        whole = [run(prompts, options.new) for _ in range(TURNS)]
        alone = [run(prompts[:1], 2)[2][0] for _ in range(TURNS)]
        beside = []
        for _ in range(TURNS):
            others = [clients.submit(ask, server.port, prompt, options.new)
                      for prompt in prompts[1:]]
            time.sleep(0.5 * min(seconds for seconds, *_ in whole))
            beside.append(ask(server.port, prompts[0], 2)[0])
            for other in others:
                other.result()
    return {"tokens_per_s": median(tokens / seconds for seconds, tokens, _ in whole),
            "first_s": median(alone), "first_beside_others_s": median(beside)}


def ask(port: int, prompt: list[int], new: int) -> tuple[float, int]:
    """Stream an answer; return (seconds to its first text, number of its tokens)."""
    began, first, used = time.perf_counter(), None, None
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    link.request("POST", "/v1/completions", json.dumps({
        "prompt": prompt, "max_tokens": new, "stream": True,
        "stream_options": {"include_usage": True}}))
    for line in link.getresponse():
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - began
            used = line
    link.close()
    return first, json.loads(used[len("data: "):])["usage"]["completion_tokens"]


def prompts_of(options) -> list[list[int]]:
    return list(random_rows(options.vocabulary, options.clients, options.prompt, seed=0))


def median(values) -> float:
    values = sorted(values)
    return values[len(values) // 2]


def parse(arguments):
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="7b5" if torch.cuda.is_available() else "nano",
                        choices=[*PUBLISHED, "nano"], help="7b5 or 4b: random weights of that "
                        "shape; or nano")
    parser.add_argument("--clients", type=within(2, 1000), default=16)
    parser.add_argument("--prompt", type=within(1, MOST_TOKENS), default=128,
                        help="tokens in a prompt (default 128)")
    parser.add_argument("--new", type=within(2, MOST_TOKENS), default=256,
                        help="tokens to generate for each prompt (default 256)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16" if torch.cuda.is_available()
                        else "fp32")
    parser.add_argument("--rank", type=as_in_train("rank"), default=16)
    parser.add_argument("--save", action="store_true", help="write a JSON to bench/results")
    options = parser.parse_args(arguments)
    check_fits(options, [options.prompt])
    # results.save reads these options; this bench has no flags for them
    options.attention, options.optimizer, options.label = "auto", Config.optimizer, None
    return options


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options, card = parse(arguments), this_card()
    folder = Path(tempfile.mkdtemp())
    try:
        out.print(f"preparing {options.model}")
        model = prepare(folder, options)
        options.vocabulary = read_config(find_folder(model)).vocab_size
        ours = {"who": "engine", **engine_side(model, folder, options)}
        torch.cuda.empty_cache()
        served = {"who": "server", **server_side(model, folder, options)}
    finally:
        shutil.rmtree(folder)
    for row in (ours, served):
        row |= {"clients": options.clients, "prompt": options.prompt, "new": options.new}
    served |= {"share_of_engine": served["tokens_per_s"] / ours["tokens_per_s"],
               "first_of_prefill": served["first_s"] / ours["first_s"]}
    rows = [ours, served]
    out.print(report.serve(rows, f"measured on {card.name}: {options.model}, NF4, {options.dtype}, "
                                 f"{options.clients} clients, {options.prompt} + {options.new} "
                                 f"tokens"))
    if options.save:
        file = results.save("serve", card, options, DTYPES[options.dtype], rows, new=options.new)
        out.print(f"saved {file}")


if __name__ == "__main__":
    main()
