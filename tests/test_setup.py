"""The set-up of a run: the parts of a step, and errors that are found before slow work."""

import pytest
import torch
from checkpoints import write_checkpoint
from conftest import ragged_examples, write_rows

from phogpt_raw.config import Config
from phogpt_raw.data.batches import Window
from phogpt_raw.model.weights import load_base
from phogpt_raw.refusal import Refusal
from phogpt_raw.training import setup
from phogpt_raw.training.loss import chunk_rows
from phogpt_raw.training.setup import make_scaler, set_up, wire
from phogpt_raw.training.step import train_step


def test_loss_scaling_is_for_fp16_alone():
    assert make_scaler(torch.float16, "cpu").get_scale() == 2.0**12
    assert make_scaler(torch.float16, "cpu").get_growth_interval() == 200
    assert make_scaler(torch.bfloat16, "cpu").get_scale() == 1.0
    assert make_scaler(torch.float32, "cpu").get_scale() == 1.0


def test_the_parts_of_a_step_are_those_asked_for(adapted):
    model, adapters = adapted()
    training = wire(model, adapters, optimizer="adamw", lr=0.25, weight_decay=0.5, clip=2.0,
                    micro_batch=3, loss_mib=8, recompute=1)
    assert training.forward is model and training.clip == 2.0
    group = training.optimizer.param_groups[0]
    assert group["params"] == [adapters.flat]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    limits = training.limits
    assert (limits.micro_batch, limits.recompute, limits.graphs) == (3, 1, False)
    assert limits.chunk_rows == chunk_rows(4096, 8)


def test_the_16_bit_copy_follows_each_update(adapted):
    """The forward reads the adapters' 16-bit copy.

    If the copy were not updated, every step would read the first weights.
    """
    model, adapters = adapted(dtype=torch.bfloat16)
    training = wire(model, adapters, lr=0.1, micro_batch=2)
    before = adapters.compute.clone()
    train_step(training, Window(ragged_examples(4), 3))
    assert torch.equal(adapters.compute, adapters.flat.bfloat16())
    assert not torch.equal(adapters.compute, before)


def config(tmp_path, base, rows, **more):
    return Config(model=str(base), data=str(rows), out=str(tmp_path / "run"), rank=4, **more)


def test_a_bad_row_is_found_before_any_weight_is_read(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(setup, "read_model", lambda *_, **__: pytest.fail("read the weights"))
    rows = write_rows(tmp_path / "rows.jsonl")
    rows.write_text(rows.read_text("utf-8") + '{"prompt": "x"}\n', "utf-8")
    with pytest.raises(Refusal, match=r"rows\.jsonl:13"):
        set_up(config(tmp_path, tiny, rows, strict=True))


def test_a_folder_that_cannot_be_used_is_found_before_any_weight_is_read(tmp_path, tiny, rows,
                                                                         monkeypatch):
    monkeypatch.setattr(setup, "read_model", lambda *_, **__: pytest.fail("read the weights"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(Refusal, match="no checkpoint to resume from"):
        set_up(config(tmp_path, tiny, rows))


def test_a_job_has_the_steps_and_the_dtype_of_its_run(tmp_path, tiny, rows):
    job = set_up(config(tmp_path, tiny, rows, epochs=2, batch_size=5, micro_batch=2, hold_out=2))
    assert job.run.steps == 4  # 2 epochs of 10 rows, 5 per step
    assert job.run.config.dtype == "fp32" and job.config.dtype == "auto"
    assert job.stream.batch_size == 5 and job.limits.micro_batch == 2
    assert len(job.examples.held_out) == 2 and job.not_captured == "there is no GPU"
    assert job.model.head.dtype == torch.float32 and not job.model.head.requires_grad


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.blocks.0.norm_1.weight",
                                  "transformer.blocks.0.attn.Wqkv.weight"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_base_with_values_that_are_not_finite_is_refused_by_name(tmp_path, name, value):
    tensors = write_checkpoint(tmp_path / "base")
    tensors[name].view(-1)[-1] = value
    write_checkpoint(tmp_path / "base", tensors=tensors)
    said = f"pytorch_model.bin: tensor {name} holds NaN or infinite values"
    with pytest.raises(Refusal, match=said):
        load_base(str(tmp_path / "base"), dtype=torch.bfloat16, device="cpu")


@pytest.mark.parametrize("name", ["transformer.wte.weight",
                                  "transformer.blocks.0.attn.Wqkv.weight"])
def test_a_weight_too_large_for_fp16_is_refused(tmp_path, name):
    tensors = write_checkpoint(tmp_path / "base")
    tensors[name][5, 5] = 1e6
    write_checkpoint(tmp_path / "base", tensors=tensors)
    load_base(str(tmp_path / "base"), dtype=torch.float32, device="cpu")
    said = f"{name} holds values up to 9.99e.05, but the largest value of fp16 is 6.55e.04"
    with pytest.raises(Refusal, match=said):
        load_base(str(tmp_path / "base"), dtype=torch.float16, device="cpu")
