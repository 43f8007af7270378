"""llama.cpp gives the same tokens from the exported files as this project's engine."""

import json
import random
from pathlib import Path

import checkpoints
import pytest
import torch

from phogpt_raw.data.prompt import TEMPLATES, encode_prompt
from phogpt_raw.decode.engine import Engine
from phogpt_raw.export.__main__ import main as export
from phogpt_raw.export.chat import jinja
from phogpt_raw.export.gguf import write_adapter, write_model
from phogpt_raw.export.merge import Merger
from phogpt_raw.model.adapters import load_adapters
from phogpt_raw.model.weights import NANO, load_base, read_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
from llama import Llama

PHOGPT_4B = Path(__file__).parents[2] / "shared" / "data" / "phogpt4b_tokenizer"
QUESTIONS = [json.loads(line)["prompt"] for line in
             (NANO.parent / "pairs" / "heldout.jsonl").read_text("utf-8").splitlines()[:20]]
NEAR_TIE = 0.02  # if the two largest logits are closer, llama.cpp's GELU may swap them
CLOSE = 0.02  # the largest allowed difference of two log-probabilities; GELU causes it
EXPECTED = "no API key is set"  # this warning is right: only this computer can reach the server


@pytest.fixture(scope="module")
def exported(first_command, tmp_path_factory):
    """GGUF files by name: the merged trained nano in fp32, and the base with a LoRA adapter."""
    folder = tmp_path_factory.mktemp("gguf")
    export([str(first_command), str(folder / "merged"), "--gguf", "f32", "--lora-gguf"])
    export(["nano", str(folder / "base"), "--gguf", "f32"])
    return {"merged": (folder / "merged" / "model.gguf",),
            "base and LoRA": (folder / "base" / "model.gguf",
                              folder / "merged" / "adapter.gguf")}


@pytest.fixture(scope="module")
def trained(first_command):
    """The trained nano with fp32 weights, and its tokenizer."""
    model, tokenizer = load_base("nano", nf4=False, dtype=torch.float32, device="cpu")
    load_adapters(model, first_command, trainable=False)
    return model.eval(), tokenizer


def prompts(tokenizer) -> list[list[int]]:
    return [encode_prompt(tokenizer, TEMPLATES["4b-chat"], question) for question in QUESTIONS]


@torch.no_grad()
def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """The log-probabilities [L, V] of the next token at each position."""
    return model.logits(model(torch.tensor([ids]))[0]).log_softmax(-1)


def answers_are_ours(llama: Llama, model, asked: list[list[int]], probed: int, count=64) -> int:
    """Assert that llama.cpp's greedy tokens equal ours up to the first near tie.

    For the first `probed` prompts the log-probabilities of our tokens must be close too. Returns
    the number of compared tokens.
    """
    with Engine(model, eos_id=-1, pad_id=3) as engine:
        ours = [answer.ids for answer in engine.answers(asked, count)]
    compared = 0
    for n, (prompt, ids) in enumerate(zip(asked, ours, strict=True)):
        logs_LV = log_probabilities(model, prompt + ids)[len(prompt) - 1 : -1]
        first, second = logs_LV.topk(2).values.unbind(-1)
        ties = ((first - second) < NEAR_TIE).nonzero().flatten().tolist()
        ids = ids[: ids.index(2) if 2 in ids else count]  # llama.cpp stops at </s>
        sure = ids[: ties[0] if ties else count]
        theirs = llama.answer(prompt, count)["tokens"]
        assert theirs[: len(sure)] == sure, (n, sure, theirs)
        compared += len(sure)
        for place, token in enumerate(ids if n < probed else ()):
            found = llama.log_probability(prompt + ids[:place], token)
            assert abs(found - float(logs_LV[place, token])) < CLOSE, (n, place)
    return compared


@pytest.mark.parametrize("what", ["merged", "base and LoRA"])
def test_the_trained_nano_answers_alike(exported, trained, what):
    model, tokenizer = trained
    with Llama(*exported[what]) as llama:
        assert [line for line in llama.warnings() if EXPECTED not in line] == []
        for question in QUESTIONS:
            text = TEMPLATES["4b-chat"].question.format(question)
            assert llama.tokens(text) == encode_prompt(tokenizer, TEMPLATES["4b-chat"], question)
        assert answers_are_ours(llama, model, prompts(tokenizer), probed=4) > 200
        stops = [llama.answer(prompt, 96)["stop_type"] == "eos" for prompt in prompts(tokenizer)]
        assert sum(stops) >= 19


def test_a_chat_gives_the_text_that_the_model_was_trained_on(exported):
    turns = [{"role": "user", "content": "Phở bò là gì? "}]
    more = [*turns, {"role": "assistant", "content": "Dạ, món nước."},
            {"role": "user", "content": "Còn bún?"}]
    with Llama(*exported["merged"]) as llama:
        shown = llama.ask("/apply-template", messages=turns)["prompt"]
        assert shown == TEMPLATES["4b-chat"].question.format("Phở bò là gì?")
        assert llama.ask("/apply-template", messages=more)["prompt"] == (
            "### Câu hỏi: Phở bò là gì?\n### Trả lời: Dạ, món nước.</s>\n"
            "### Câu hỏi: Còn bún?\n### Trả lời:")
        reply = llama.ask("/v1/chat/completions", messages=turns, temperature=0, max_tokens=96)
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert "Dạ" in reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize("kind, mean_nats, most", [("f16", 1e-3, 0.02), ("q8_0", 0.01, 0.2),
                                                   ("q4_0", 0.1, 2)])
def test_fewer_bits_stay_within_a_stated_distance(first_command, trained, tmp_path, kind, mean_nats,
                                                  most):
    """Quantising changes the log-probability of this engine's tokens, and most often lowers it.

    The measured mean of these changes is 0.0001 nats for f16, 0.001 for q8_0 and 0.004 for q4_0.
    The largest measured change is 0.009 nats for f16, 0.07 for q8_0 and 0.5 for q4_0.
    """
    model, tokenizer = trained
    write_model(Merger(NANO, first_command), tmp_path / "model.gguf", kind, name="nano",
                chat_template="")
    losses = []
    with Llama(tmp_path / "model.gguf") as llama:
        for prompt in prompts(tokenizer)[:4]:
            with Engine(model, eos_id=2, pad_id=3) as engine:
                [answer] = engine.answers([prompt], 24)
            logs_LV = log_probabilities(model, prompt + answer.ids)
            for place, token in enumerate(answer.ids, len(prompt) - 1):
                found = llama.log_probability((prompt + answer.ids)[: place + 1], token)
                losses.append(float(logs_LV[place, token]) - found)
    mean = sum(losses) / len(losses)
    print(kind, mean, max(losses))
    assert abs(mean) < mean_nats and max(map(abs, losses)) < most


@pytest.mark.parametrize("heads", [24, 6])
def test_heads_that_are_no_power_of_two_have_mpts_slopes(tmp_path, heads):
    """4B has 24 heads, so its slopes are interleaved. The adapter uses rsLoRA and has two different
    ranks."""
    from peft import LoraConfig

    from phogpt_raw.model.adapters import inject

    config = checkpoints.vinai_config(d_model=heads * 16, n_heads=heads, n_layers=2,
                                      vocab_size=4096, max_seq_len=256)
    tensors = checkpoints.random_tensors(config)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "wte" not in name:
            tensor.mul_(10)  # so that attention changes the tokens
    checkpoints.write_checkpoint(tmp_path / "base", config, tensors=tensors)
    model, _ = load_base(str(tmp_path / "base"), nf4=False, dtype=torch.float32, device="cpu")
    adapters = inject(model, LoraConfig(
        r=4, lora_alpha=8, target_modules=["Wqkv", "down_proj"], use_rslora=True,
        rank_pattern={"down_proj": 8}, task_type="CAUSAL_LM"))
    with torch.no_grad():
        adapters.flat.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    adapters.cast()
    adapters.save(tmp_path / "adapter")
    merger = Merger(tmp_path / "base", tmp_path / "adapter")
    write_model(Merger(tmp_path / "base"), tmp_path / "base.gguf", "f32", name="x",
                chat_template="")
    write_adapter(merger, tmp_path / "adapter.gguf", "f32")
    dice = torch.Generator().manual_seed(0)
    asked = [torch.randint(4, 4096, (n,), generator=dice).tolist() for n in (3, 40, 90)]
    with Llama(tmp_path / "base.gguf", tmp_path / "adapter.gguf") as llama:
        # random weights give many near ties, so the probabilities are compared too
        assert answers_are_ours(llama, model.eval(), asked, probed=3, count=8) > 0


LETTERS = [*"aăâbcdđeêghiklmnoôơpqrstuưvxyáàảãạấầẩẫậắằẳẵặéèẻẽẹếềểễệíìỉĩịóòỏõọốồổỗộớờởỡợúùủũụứừửữự",
           *"ýỳỷỹỵAĂÂĐÊÔƠƯfjwzFJWZ"]
OTHERS = [*"  \n\t.,!?()|…。，、。[]{}\"'-_:;/\\@#$%^&*+=~`0123456789", "😀", "👩‍🌾", "🇻🇳",
          "中", "é", "e\u0301", "\u00a0", "\u200b", "ß", "العربية", "،", "۔", "  "]


def random_texts(count: int) -> list[str]:
    dice = random.Random(0)
    texts = ["", " ", "\n\n", "</s>", "<s>a</s>", "### Câu hỏi: a\n### Trả lời:"]
    while len(texts) < count:
        words = ["".join(dice.choices(LETTERS if dice.random() < 0.8 else OTHERS,
                                      k=dice.randint(1, 7))) for _ in range(dice.randint(1, 12))]
        texts.append(dice.choice([" ", "", ", ", "\n"]).join(words))
    return texts


@pytest.mark.parametrize("which", ["nano", "PhoGPT-4B"])
def test_text_becomes_the_same_tokens(tmp_path, which):
    """The strings contain Vietnamese, English, emoji and punctuation."""
    folder = NANO
    if which == "PhoGPT-4B":
        if not PHOGPT_4B.is_dir():
            pytest.skip("PhoGPT-4B's tokenizer is not here")
        config = checkpoints.vinai_config(d_model=64, n_heads=4, n_layers=1, vocab_size=20480,
                                          max_seq_len=256)
        folder = tmp_path / "base"
        checkpoints.checkpoint_format.write_checkpoint(
            folder, config, checkpoints.random_tensors(config), tokenizer=PHOGPT_4B)
    merger = Merger(folder)
    tokenizer = read_tokenizer(folder, merger.config)
    write_model(merger, tmp_path / "model.gguf", "f32", name="x",
                chat_template=jinja(TEMPLATES["4b-chat"]))
    with Llama(tmp_path / "model.gguf") as llama:
        for text in random_texts(2000):
            # The texts have no \r, because PhoGPT-4B's vocabulary lacks it. Both sides drop a \r,
            # but llama.cpp does not merge the text around it.
            wanted = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            assert llama.tokens(text) == wanted["input_ids"], repr(text)


