"""The learning rate, the optimizers of the flat buffer, and saving and restoring their state."""

import doctest
import io

import pytest
import torch

from phogpt_raw.training import optim as module
from phogpt_raw.training.optim import load_state, lr_at, make_optimizer, paged_bytes


def test_doctest():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_learning_rate_rises_to_the_peak_and_falls_to_the_floor(warmup):
    rates = [lr_at(step, 40, 2e-4, warmup, 0.1) for step in range(41)]
    assert rates[:warmup] == pytest.approx([2e-4 * (n + 1) / warmup for n in range(warmup)])
    assert rates[warmup] == max(rates) == 2e-4
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert rates[40] == pytest.approx(2e-5)
    middle = lr_at(warmup + (40 - warmup) / 2, 40, 2e-4, warmup, 0.1)
    assert middle == pytest.approx((2e-4 + 2e-5) / 2)
    assert lr_at(100, 40, 2e-4, warmup, 0.1) == pytest.approx(2e-5)  # the rate falls no further


def test_every_step_has_a_learning_rate_above_zero_even_in_runs_shorter_than_the_warm_up():
    for steps in (1, 2, 5, 10):
        assert all(0 < lr_at(s, steps, 1.0, 10, 0.0) <= 1 for s in range(steps))
    assert lr_at(0, 1, 1.0, 0, 0.0) == 1.0


def walk(optimizer, flat, steps, first=0):
    """Run optimizer steps on a quadratic function with noisy gradients.

    The function is steep in some directions and flat in others.
    """
    steep = torch.logspace(-2, 0, len(flat), device=flat.device)
    for step in range(first, first + steps):
        dice = torch.Generator().manual_seed(step)
        noise = torch.randn(len(flat), generator=dice).to(flat.device)
        flat.grad = steep * (flat.detach() - 1) + 0.1 * noise
        optimizer.step()


def start(kind, size=4096, device="cpu", **settings):
    flat = torch.nn.Parameter(torch.zeros(size, device=device))
    settings = {"lr": 1e-2, "weight_decay": 0.0, **settings}
    return flat, make_optimizer(flat, kind, **settings)


def test_8_bit_state_stays_close_to_32_bit():
    """A moment that is stored in 8 bits has an error of a few per cent.

    So each optimizer step has such an error too. Over 30 steps errors of opposite sign partly
    cancel. The results therefore differ by less than 5 %.
    """
    ends = []
    for kind in ("adamw", "paged_adamw_8bit"):
        flat, optimizer = start(kind)
        walk(optimizer, flat, 30)
        ends.append(flat.detach())
    gap = float((ends[1] - ends[0]).norm() / ends[0].norm())
    assert 0 < gap < 0.05


def test_the_state_of_the_8_bit_optimizer_is_8_bit():
    flat, optimizer = start("paged_adamw_8bit")
    walk(optimizer, flat, 1)
    state = optimizer.state[flat]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert state["state1"].numel() == flat.numel()


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw_8bit"])
def test_weight_decay_is_decoupled(kind):
    flat, optimizer = start(kind, lr=0.1, weight_decay=0.5)
    flat.data.fill_(1.0)
    flat.grad = torch.zeros_like(flat)
    optimizer.step()
    torch.testing.assert_close(flat.detach(), torch.full_like(flat, 0.95))


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw_8bit"])
def test_state_goes_through_a_file_and_on_to_the_bit(kind):
    flat, optimizer = start(kind)
    walk(optimizer, flat, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = torch.nn.Parameter(flat.detach().clone())
    restored = make_optimizer(other, kind, 5.0, 0.5)  # the saved values replace 5.0 and 0.5
    load_state(restored, torch.load(file, map_location="cpu", weights_only=True))
    for name, value in optimizer.state[flat].items():
        got = restored.state[other][name]
        if isinstance(value, torch.Tensor):
            assert got.dtype == value.dtype, name
            assert torch.equal(got, value), name
        else:
            assert got == value, name
    for a, b in ((optimizer, flat), (restored, other)):
        walk(a, b, 5, first=5)
    assert torch.equal(flat, other)


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw_8bit"])
def test_an_update_allocates_no_state(kind):
    """The state is allocated at the start. So an update cannot run out of memory in the middle."""
    flat, optimizer = start(kind)
    before = {name: value.data_ptr() for name, value in optimizer.state[flat].items()
              if isinstance(value, torch.Tensor)}
    assert len(before) >= 3
    walk(optimizer, flat, 2)
    after = optimizer.state[flat]
    assert {name: after[name].data_ptr() for name in before} == before


@pytest.mark.parametrize("kind, state, bound", [
    ("adamw", torch.optim.AdamW, 1e-6),  # 1e-6: only our AdamW is fused
    ("paged_adamw_8bit", None, 0),  # equal bit for bit
])
def test_state_made_at_the_start_changes_no_step(kind, state, bound):
    flat, optimizer = start(kind)
    walk(optimizer, flat, 5)
    plain = torch.nn.Parameter(torch.zeros(4096))
    import bitsandbytes as bnb
    make = state or bnb.optim.AdamW8bit
    walk(make([plain], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0), plain, 5)
    assert (flat - plain).abs().max() <= bound


def test_paged_bytes_are_those_of_the_8_bit_moments():
    assert paged_bytes(start("paged_adamw_8bit", size=8192)[1]) == 2 * 8192
    assert paged_bytes(start("adamw")[1]) == 0


def test_a_checkpoint_of_an_older_version_goes_on():
    """In the older version 32-bit AdamW was not fused, and its first step made the state."""
    flat = torch.nn.Parameter(torch.zeros(4096))
    older = torch.optim.AdamW([flat], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    walk(older, flat, 3)
    other = torch.nn.Parameter(flat.detach().clone())
    restored = make_optimizer(other, "adamw", 1e-2, 0.0)
    load_state(restored, older.state_dict())
    assert restored.param_groups[0]["fused"]
    for a, b in ((older, flat), (restored, other)):
        walk(a, b, 3, first=3)
    assert (flat - other).abs().max() < 1e-6


@pytest.mark.gpu
def test_paged_state_is_paged_again_after_loading():
    flat, optimizer = start("paged_adamw_8bit", size=200_192, device="cuda")
    walk(optimizer, flat, 3)
    assert optimizer.state[flat]["state1"].is_paged
    torch.cuda.synchronize()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = torch.nn.Parameter(flat.detach().clone())
    restored = make_optimizer(other, "paged_adamw_8bit", 1e-2, 0.0)
    load_state(restored, torch.load(file, map_location="cpu", weights_only=True))
    torch.cuda.synchronize()
    for name in ("state1", "state2"):
        was, now = optimizer.state[flat][name], restored.state[other][name]
        assert getattr(now, "is_paged", False), name
        assert now.dtype == torch.uint8
        assert torch.equal(was.cpu(), now.cpu()), name
    for a, b in ((optimizer, flat), (restored, other)):
        walk(a, b, 3, first=3)
    torch.cuda.synchronize()
    assert torch.equal(flat, other)
