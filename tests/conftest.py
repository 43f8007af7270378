"""Settings and fixtures for all tests: no network, one thread, and a tiny model.

Tests that need a GPU are skipped if torch sees none.
"""

import fcntl
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import checkpoints
import pytest
import torch

from phogpt_raw.data.prompt import Example, next_tokens
from phogpt_raw.model.adapters import new_adapters
from phogpt_raw.model.weights import load_base, read_tokenizer
from phogpt_raw.show import plots
from phogpt_raw.training.loss import summed_loss
from phogpt_raw.training.run import CARD

PICTURES = plots.pictures
torch.set_num_threads(1)  # models of this size run no faster with a second thread


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a random model of 0.4 million parameters in VinAI's format."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    checkpoints.write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny):
    config = checkpoints.vinai_config(**checkpoints.SHAPES["tiny"])
    return read_tokenizer(tiny, checkpoints.ModelConfig.from_json(config))


@pytest.fixture(scope="session")
def first_command(tmp_path_factory):
    """The folder of a run of `python train.py --steps 60`.

    With `pytest -n` all test processes share this folder. The first process that needs the folder
    trains.
    """
    import train

    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    folder = place / "first" / "nano"
    with (place / "first.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / CARD).is_file():  # a run writes this file last
            train.main(["--steps", "60", "--out", str(folder)])
    return folder


@pytest.fixture
def adapted(tiny):
    """A function that loads tiny with LoRA adapters.

    Their B matrices are random, because new B matrices are zero and would not change any output.
    """

    def load(*, nf4=False, dtype=torch.float32, **lora):
        model, _ = load_base(str(tiny), nf4=nf4, dtype=dtype, device="cpu")
        adapters = new_adapters(model, **{"rank": 4, "alpha": 8, **lora})
        dice = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, view in adapters.views:
                if "lora_B" in name:
                    view.normal_(std=0.02, generator=dice)
        adapters.cast()
        return model.train(), adapters

    return load


@pytest.fixture
def lively(adapted):
    """tiny with larger block weights, so that the next token depends on the tokens before it."""
    model, _ = adapted()
    with torch.no_grad():
        for p in model.parameters():
            if not p.requires_grad and p.dim() == 2 and p is not model.head:
                p.mul_(10)
    return model.eval()


def example(ids: list[int], answer: int, where: str) -> Example:
    """A document; its last `answer` tokens are supervised."""
    return Example(ids, next_tokens(ids, start=len(ids) - answer), where=where)


def batch_loss(model, batch, chunk=16, **forward) -> torch.Tensor:
    """The summed loss of a micro-batch's supervised tokens, computed as train_step does."""
    hidden_BLD = model(batch.ids_BL, batch.doc_BL, **forward)
    hidden_TD = hidden_BLD.flatten(0, 1).index_select(0, batch.rows_T)
    return summed_loss(hidden_TD, model.head, batch.targets_T, chunk)


def ragged_examples(count: int, *, seed: int = 0, vocabulary: int = 4096, longest: int = 60):
    """Examples of very different lengths.

    For these examples the average of the examples' average losses clearly differs from the average
    loss of all tokens.
    """
    dice = torch.Generator().manual_seed(seed)
    examples = []
    for n in range(count):
        length = int(torch.randint(6, longest, (1,), generator=dice))
        answer = int(torch.randint(1, length - 2, (1,), generator=dice))
        ids = torch.randint(4, vocabulary, (length,), generator=dice).tolist()
        examples.append(example(ids, answer, f"row:{n + 1}"))
    return examples


QUESTIONS = [
    ("Phở bò là gì?", "Dạ, phở bò là món nước có bánh phở và thịt bò ạ."),
    ("Thủ đô của Việt Nam?", "Dạ, là Hà Nội ạ."),
    ("Nấu cơm thế nào?", "Dạ, bạn vo gạo, thêm nước rồi nấu trong hai mươi phút ạ."),
    ("Một tuần có mấy ngày?", "Dạ, bảy ngày ạ."),
    ("Cá sống ở đâu?", "Dạ, cá sống dưới nước, ở sông, hồ và biển ạ."),
    ("Mưa từ đâu mà có?", "Dạ, hơi nước bốc lên thành mây rồi rơi xuống thành mưa ạ."),
    ("Ai viết Truyện Kiều?", "Dạ, Nguyễn Du ạ."),
    ("Áo dài mặc khi nào?", "Dạ, vào dịp lễ, Tết và trong đám cưới ạ."),
    ("Chó kêu ra sao?", "Dạ, gâu gâu ạ."),
    ("Vì sao lá xanh?", "Dạ, vì lá có chất diệp lục ạ."),
    ("Trà đá là gì?", "Dạ, trà đá là nước chè pha loãng, uống với đá ạ."),
    ("Xe đạp có mấy bánh?", "Dạ, hai bánh ạ."),
]


def write_rows(file: Path, pairs=QUESTIONS) -> Path:
    file.write_text("".join(
        json.dumps({"prompt": q, "response": a}, ensure_ascii=False) + "\n" for q, a in pairs
    ), "utf-8")
    return file


@pytest.fixture
def rows(tmp_path) -> Path:
    """A small .jsonl of questions and answers."""
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def train(tiny, rows, capsys, monkeypatch):
    """A function that runs train.py on tiny in this process; it returns (status, stdout, stderr).

    The pictures of these runs are empty, because drawing takes half of the time of a run.
    test_plots.py draws them.
    """
    import train as script

    monkeypatch.setattr(plots, "pictures", lambda *_: (b"<svg/>", b"PNG"))

    def run(*flags, at=None):
        """`at` = (n, exception): call number n (0, 1, …) of lr_at raises the exception.

        train.py computes the learning rate once in each step.
        """
        with monkeypatch.context() as patch:
            if at:
                patch.setattr(script, "lr_at", breaking_off(script.lr_at, *at))
            status = 0
            try:
                settings = {**SMALL, "--model": tiny, "--data": rows}
                if "--adapter" in flags:  # an adapter keeps its own rank
                    del settings["--rank"]
                script.main(command_line(settings, flags))
            except SystemExit as left:
                status = left.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def train_and_draw(train, monkeypatch):
    """Like the fixture `train`, but the runs draw their pictures."""
    monkeypatch.setattr(plots, "pictures", PICTURES)
    return train


SMALL = {"--steps": 7, "--batch-size": 4, "--micro-batch": 2, "--rank": 4, "--lr": 1e-2,
         "--hold-out": 3, "--eval-every": 2, "--eval-answers": 2, "--answer-tokens": 4,
         "--save-every": 3}


def command_line(settings: dict, flags) -> list[str]:
    """The arguments of `settings`, then `flags`.

    A flag removes the setting of the same name. --epochs removes --steps, and --batch-tokens
    removes --batch-size.
    """
    either = {"--epochs": "--steps", "--batch-tokens": "--batch-size"}
    named = {either.get(flag, flag) for flag in flags}
    kept = [(name, value) for name, value in settings.items() if name not in named]
    return [str(part) for part in (*(part for pair in kept for part in pair), *flags)]


def breaking_off(lr_at, step, exception):
    """A function like lr_at, but its call number `step` (0, 1, …) raises `exception`."""
    calls = iter(range(10_000))

    def rate(*args):
        if next(calls) == step:
            raise exception
        return lr_at(*args)

    return rate
