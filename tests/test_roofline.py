"""The time of a step from its operations, compared with arithmetic by hand."""

from dataclasses import replace

import pytest
from traces import traced

from phogpt_raw.simulate.ledger import Op
from phogpt_raw.simulate.rates import KNOWN, Rates
from phogpt_raw.simulate.roofline import Seconds, by_phase, op_seconds, step_seconds

# Invented rates: 100 to 200 FLOP/s for matmuls and a tenth of it for attention; 1 to 4 bytes/s of
# memory traffic; 0.25 to 0.5 s between two kernels of a graph; 2 to 3 s for an eager launch.
RATES = Rates((100, 200), (0.1, 0.1), (1, 4), (0.25, 0.5), (2.0, 3.0), "invented")
MATMUL = Op("aten.mm.default", "forward", flops=1000, moved=1)
ATTENTION = replace(MATMUL, name="aten._scaled_dot_product_efficient_attention.default")
COPY = Op("aten.copy_.default", "backward", flops=0, moved=100)


@pytest.mark.parametrize("op, slow, fast", [
    (MATMUL, 10.0, 5.0),
    (ATTENTION, 100.0, 50.0),
    (COPY, 100.0, 25.0),
    (replace(MATMUL, moved=40), 40.0, 10.0),  # limited by bytes at both rates
    (replace(MATMUL, moved=16), 16.0, 5.0),   # low rates: by bytes; high rates: by FLOPs
])
def test_an_operation_takes_as_long_as_its_flops_or_its_bytes_and_a_launch(op, slow, fast):
    assert op_seconds(op, RATES, 0) == slow + 0.5
    assert op_seconds(op, RATES, 1) == fast + 0.25


def test_the_operations_of_a_step_add_up():
    seconds = step_seconds([MATMUL, ATTENTION, COPY], RATES)
    assert seconds == Seconds(low=80 + 3 * 0.25, high=210 + 3 * 0.5, host=(6.0, 9.0))
    assert seconds.middle == (80.75 + 211.5) / 2


def test_launches_alone_take_time():
    nothing = Op("aten.zero_.default", "zero", 0, 0)
    assert step_seconds([nothing] * 8, RATES) == Seconds(2.0, 4.0, (16.0, 24.0))


def test_operations_may_come_one_by_one():
    assert step_seconds(iter([MATMUL, COPY]), RATES) == step_seconds([MATMUL, COPY], RATES)


@pytest.mark.parametrize("seconds, bound", [
    (Seconds(1, 2, (2.5, 3)), True), (Seconds(1, 2, (2, 3)), False),
    (Seconds(1, 2, (1.5, 9)), False), (Seconds(1, 2), False)])
def test_a_step_waits_for_the_host_where_that_is_slower_even_at_best(seconds, bound):
    assert seconds.host_bound is bound


def test_an_eager_step_takes_as_long_as_the_card_or_the_host():
    assert Seconds(1, 2, (2, 4)).eager == 3
    assert Seconds(3, 5, (2, 4)).eager == Seconds(3, 5, (2, 4)).middle == 4


@pytest.mark.parametrize("name", KNOWN)
def test_phases_add_up_to_the_step_on_every_card(name):
    ops, rates = traced(recompute=1).ops, KNOWN[name].rates
    whole, phases = step_seconds(ops, rates), by_phase(iter(ops), rates)
    assert list(phases) == ["zero", "forward", "backward", "clip", "optimizer"]
    assert sum(s.low for s in phases.values()) == pytest.approx(whole.low)
    assert sum(s.high for s in phases.values()) == pytest.approx(whole.high)
    for n in (0, 1):
        assert sum(s.host[n] for s in phases.values()) == pytest.approx(whole.host[n])
    for seconds in (whole, *phases.values()):
        assert 0 < seconds.low <= seconds.middle <= seconds.high
    assert whole.host_bound  # the model is so small that the GPU waits for the host
