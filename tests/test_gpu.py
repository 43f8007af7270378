"""What only a GPU can show: 16-bit arithmetic, kernels, waiting, pages."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from phogpt_raw.data.batches import make_window
from phogpt_raw.data.prompt import Example
from phogpt_raw.model.adapters import new_adapters
from phogpt_raw.model.attention import alibi_slopes, attend, attention_bias
from phogpt_raw.model.weights import load_base
from phogpt_raw.training.optim import make_optimizer
from phogpt_raw.training.step import make_micro_step, make_scaler, train_step

pytestmark = pytest.mark.gpu
SIXTEEN_BIT = [torch.float16, torch.bfloat16]


def random_window(vocabulary: int, rows: int = 4, micro_batch: int = 2):
    dice = torch.Generator().manual_seed(0)
    lengths = [40, 17, 64, 33][:rows]
    examples = [Example(torch.randint(4, vocabulary, (n,), generator=dice).tolist(), n // 2, False,
                        "random") for n in lengths]
    return make_window(examples, micro_batch, pad_id=3)


def setup(dtype, recompute=0, nf4=True):
    model, _ = load_base("nano", nf4=nf4, dtype=dtype, device="cuda")
    model.recompute = recompute
    adapters = new_adapters(model, rank=16, alpha=32)
    optimizer = make_optimizer(adapters.flat, "paged_adamw_8bit", 1e-3, 0.0)
    scaler = make_scaler(dtype, "cuda")
    return model, adapters, optimizer, scaler


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("backend", [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def test_attention_in_sixteen_bits_equals_the_formula_in_fp32(dtype, backend):
    """Each kernel, the memory-efficient one above all: it is what a T4 and a V100 have."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 24, 256, 128, device="cuda", dtype=dtype) for _ in range(3))
    doc = (torch.arange(256, device="cuda") >= 200).long().expand(2, 256)
    slopes = alibi_slopes(24).cuda()
    with sdpa_kernel(backend):
        ours = attend(q, k, v, attention_bias(slopes, 256, 256, dtype, doc), None)
    exact = attention_bias(slopes, 256, 256, torch.float32, doc)
    scores = (q.float() @ k.float().transpose(-1, -2)) / 128**0.5 + exact
    wanted = scores.softmax(-1) @ v.float()
    # 3 roundings of the result's size (scores, probabilities, output): eps is 2^-10 and 2^-7
    assert (ours.float() - wanted).abs().max() < 3 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_training_repeats_a_window_until_the_loss_falls(dtype):
    model, adapters, optimizer, scaler = setup(dtype)
    window = random_window(4096)
    micro_step = make_micro_step(model, scaler, 64)
    losses = [float(train_step(window, micro_step, adapters.flat, optimizer, scaler, 1.0).loss)
              for _ in range(20)]
    assert all(map(torch.isfinite, map(torch.tensor, losses))) and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_gradients_on_the_gpu_are_those_of_the_cpu_in_fp32(dtype):
    """The plain base, so that only rounding differs; B is not zero, so that A has a gradient."""
    window, gradients = random_window(4096), {}
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        model, _ = load_base("nano", nf4=False, dtype=kind, device=device)
        adapters = new_adapters(model, rank=16, alpha=32)
        fill = torch.randn(len(adapters.flat), generator=torch.Generator().manual_seed(1)) * 0.02
        adapters.flat.data.copy_(fill)
        scaler = make_scaler(kind, device)
        micro_step = make_micro_step(model, scaler, 64)
        supervised = torch.tensor(float(window.supervised), device=device)
        for batch in window.batches:
            micro_step(batch.to(device), supervised)
        gradients[device] = adapters.flat.grad.cpu().double() / scaler.get_scale()
    wanted, got = gradients["cpu"], gradients["cuda"]
    # through 8 blocks of 16-bit rounding (eps 2^-10 and 2^-7): a few eps in the norm
    assert (got - wanted).norm() < 16 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("recompute", [0, 8])
def test_micro_batches_and_clipping_do_not_wait_for_the_gpu(recompute):
    model, adapters, optimizer, scaler = setup(torch.float16, recompute)
    window = random_window(4096)
    micro_step = make_micro_step(model, scaler, 64)
    train_step(window, micro_step, adapters.flat, optimizer, scaler, 1.0)  # first-time set-up

    def mark(phase):
        waiting_is = "default" if phase == "optimizer" else "error"
        torch.cuda.set_sync_debug_mode(waiting_is)

    try:
        train_step(window, micro_step, adapters.flat, optimizer, scaler, 1.0, mark)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recomputing_keeps_less_and_gives_the_same_gradient():
    kept, gradients = {}, {}
    for recompute in (0, 8):
        model, adapters, _, scaler = setup(torch.bfloat16, recompute)
        window = random_window(4096)
        micro_step = make_micro_step(model, scaler, 64)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        micro_step(window.batches[-1].to("cuda"), torch.tensor(50.0, device="cuda"))
        kept[recompute] = torch.cuda.max_memory_allocated() - before
        gradients[recompute] = adapters.flat.grad.clone()
    assert kept[8] < kept[0]
    assert torch.equal(gradients[0], gradients[8])


def test_nf4_made_on_the_gpu_stays_what_it_is_through_training():
    model, adapters, optimizer, scaler = setup(torch.float16)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    micro_step = make_micro_step(model, scaler, 64)
    for _ in range(3):
        train_step(random_window(4096), micro_step, adapters.flat, optimizer, scaler, 1.0)
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in before.items())
