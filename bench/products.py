"""Bench of products of a few activation rows with a 4-bit matrix: bitsandbytes' kernels and ours.

    python bench/products.py --save                  on a GPU
    python bench/products.py --model 4b --rows 1,2

For every matrix shape of a model, the bench measures the microseconds of one product with bias, in
a replayed CUDA graph. The products use several matrices of this shape in turns, like the layers of
a model. Together the matrices are larger than the GPU's cache, so each product must read its matrix
from GPU memory. TB/s is the rate of reading the matrix's 4-bit values and scales.
"""

import statistics

import torch

from bench import report, results
from bench.command_line import several
from phogpt_raw.cards import DTYPES, this_card
from phogpt_raw.command_line import Parser
from phogpt_raw.config import Config
from phogpt_raw.decode.fused import linear_of
from phogpt_raw.model.nf4 import NF4_BYTES, nf4_linear
from phogpt_raw.model.nf4_product import MOST, Scratch, halves, product
from phogpt_raw.model.phogpt import PUBLISHED
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.show.console import out

CACHE = 300e6  # bytes of all matrices of a shape together; larger than the cache of any GPU
REPLAYS = 7


def replayed_s(run, calls: int) -> float:
    """Seconds of one call of `run`. The calls run(0), run(1), … are captured as one CUDA graph, and
    the result is the median of REPLAYS replays."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(calls):
            run(n)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / 1e3 / calls)
    return statistics.median(times)


@torch.no_grad()
def measure(out_features: int, width: int, rows: list[int], dtype: torch.dtype) -> list[dict]:
    """Measure products with matrices of this shape. rows: the numbers of activation rows. Returns a
    row of the result for each of these numbers."""
    size = NF4_BYTES * out_features * width
    layers = []
    for _ in range(max(2, int(CACHE / size))):
        weight = 0.02 * torch.randn(out_features, width, device="cuda", dtype=dtype)
        bias = torch.nn.Parameter(torch.zeros(out_features, device="cuda", dtype=dtype), False)
        layers.append(nf4_linear(weight, dtype, "cuda", bias))
    linears, scratch = [linear_of(layer) for layer in layers], Scratch(out_features, "cuda")

    def compared(count: int) -> dict:
        x_ND = torch.randn(count, width, device="cuda", dtype=dtype)
        x_N2, calls = halves(x_ND), max(16, 2 * len(layers))
        theirs = replayed_s(lambda n: layers[n % len(layers)](x_ND), calls)
        ours = replayed_s(lambda n: product(x_N2, linears[n % len(layers)], scratch), calls)
        return {"out": out_features, "in": width, "rows": count, "bitsandbytes_s": theirs,
                "ours_s": ours, "bytes_per_s": size / ours, "times_faster": theirs / ours}

    return [compared(count) for count in rows]


def parse(arguments):
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="7b5", choices=PUBLISHED,
                        help="the model whose matrix shapes are used (default 7b5)")
    parser.add_argument("--rows", type=several(1, MOST), default=[1, 2, 4, 8, 16], metavar="N,…",
                        help="rows that are multiplied with a matrix (default 1,2,4,8,16)")
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"),
                        help="data type of the rows (default fp16)")
    parser.add_argument("--save", action="store_true", help="write the result to bench/results")
    options = parser.parse_args(arguments)
    # results.save reads these options; this bench has no flags for them
    options.attention, options.optimizer, options.label = "auto", Config.optimizer, None
    options.rank = Config.rank
    return options


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    card, shape = this_card(), PUBLISHED[options.model]
    if card.device == "cpu":
        raise Refusal("products.py: the kernels need a GPU, and there is none here")
    d, wide = shape.d_model, shape.expansion_ratio * shape.d_model
    rows = [row for size in ((3 * d, d), (d, d), (wide, d), (d, wide))
            for row in measure(*size, options.rows, DTYPES[options.dtype])]
    out.print(report.products(rows, f"measured on {card.name}: {options.model}, {options.dtype}"))
    if options.save:
        out.print(f"saved {results.save('products', card, options, DTYPES[options.dtype], rows)}")


if __name__ == "__main__":
    main()
