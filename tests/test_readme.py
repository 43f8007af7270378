"""Files, flags and presets that README and docs/ name exist. Measured values are in LOG.md."""

import re
import shlex
from pathlib import Path

import pytest

from phogpt_raw.command_line import from_command_line, preset_names

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "phogpt_raw" / "nano" / "base" / "README.md", ROOT / "LOG.md",
         *DOCS]
README = PAGES[0].read_text("utf-8")


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_training_commands_are_valid(tmp_path):
    found = [c.split("&&")[-1].strip() for c in commands(README)]
    training = [shlex.split(c)[2:] for c in found if c.startswith("python train.py")]
    assert len(training) >= 3
    for arguments in training:
        from_command_line(arguments, "")


def test_export_commands_are_valid(tmp_path, monkeypatch):
    from phogpt_raw.export.__main__ import parse

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_for_this_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = [shlex.split(c)[3:] for page in (README, *(file.read_text("utf-8") for file in DOCS))
             for c in commands(page) if c.startswith("python -m phogpt_raw.export")]
    assert len(found) >= 2
    for arguments in found:
        Path(arguments[0]).mkdir(parents=True, exist_ok=True)
        (Path(arguments[0]) / "adapter_config.json").touch()
        parse(arguments)


def test_the_two_commands_stand_there_as_ci_runs_them():
    assert sum(c.startswith("pip install -c constraints.txt -e . && python train.py")
               for c in commands(README)) == 1
    assert sum(c.startswith("pip install -c constraints.txt") and "&& pytest" in c
               for c in commands(README)) == 1


def test_presets_and_pairs_are_as_stated():
    for preset in preset_names():
        assert f"presets/{preset}.toml" in README
    pairs = (ROOT / "phogpt_raw" / "nano" / "pairs" / "train.jsonl").read_text("utf-8")
    assert f"{len(pairs.splitlines())} pairs" in README


def test_every_measured_figure_typed_by_hand_is_in_the_log():
    """The test reads the figures outside the markers of tables.

    Another test compares the figures between the markers with bench/results.
    """
    log = (ROOT / "LOG.md").read_text("utf-8")
    measured = [README.split("## Measured beside other programs")[1].split("\n## ")[0],
                *(file.read_text("utf-8") for file in DOCS)]
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", "\n".join(measured), flags=re.DOTALL)
    cells = re.findall(r"\| (\d+\.\d+)(?: GiB| s)?(?=[ ,])", text)
    prose = re.findall(r"(\d[\d,]*) tokens/s|(\d+\.\d+)\s+times", text)
    figures = [*cells, *filter(None, (figure for found in prose for figure in found))]
    assert len(figures) >= 30
    assert [figure for figure in figures if figure not in log] == []


def test_pins_differ_in_torch_alone():
    def pins(name):
        lines = (ROOT / name).read_text().splitlines()
        return {line for line in lines if line and not line.startswith("#")}

    assert pins("constraints.txt") ^ pins("constraints-v100.txt") == {
        "torch==2.13.0", "torch==2.10.0"}
