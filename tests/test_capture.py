"""When a model is captured as CUDA graphs, and what the twin does where it cannot be."""

import pytest
import torch

from phogpt_raw.training.capture import why_not


def test_a_model_on_a_gpu_is_captured(adapted):
    assert why_not(adapted()[0], "cuda", True) is None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_flag_that_says_no_is_the_first_reason(adapted, device, dropout):
    assert why_not(adapted(dropout=dropout)[0], device, False) == "--no-capture"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_there_are_no_graphs_on_the_cpu(adapted, dropout):
    assert why_not(adapted(dropout=dropout)[0], "cpu", True) == "graphs need a GPU"


def test_dropout_is_not_captured(adapted):
    """PEFT puts an nn.Dropout into each layer; with probability 0 an Identity stands there."""
    model, _ = adapted(dropout=0.1)
    assert "dropout" in why_not(model, "cuda", True)
    assert "dropout" in why_not(model.eval(), "cuda", True)  # it is trained later
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    assert why_not(model, "cuda", True) is None
