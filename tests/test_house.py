"""Import order: a module imports only from modules above it in the list of docs/reading.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "phogpt_raw"


def reading_order() -> list[str]:
    """The modules in docs/reading.md, in the same order. data/rows.py has the name `data.rows`."""
    page = (ROOT / "docs" / "reading.md").read_text("utf-8")
    links = re.findall(r"^\| \[.*?\]\(\.\./phogpt_raw/([\w/]+)\.py\)", page, re.MULTILINE)
    return [link.replace("/", ".") for link in links]


MODULES = reading_order()
ABOVE_NANO = MODULES[: MODULES.index("training.loss")]


def modules() -> dict[str, Path]:
    """The file of every module of the package except __init__, by dotted name."""
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
            for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"}


def imported(file: Path) -> set[str]:
    """The dotted names of all imports in a file, also of imports inside functions.

    `from phogpt_raw import console` counts as an import of the module `phogpt_raw.console`.
    """
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def modules_used(file: Path) -> set[str]:
    inside = {name.removeprefix("phogpt_raw.") for name in imported(file)}
    return inside & modules().keys()


def test_every_module_stands_once_in_the_reading_list():
    assert sorted(name for name in modules() if not name.startswith("nano.")) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_uses_only_those_above_it(module):
    used = modules_used(PACKAGE / f"{module.replace('.', '/')}.py")
    assert used <= set(MODULES[: MODULES.index(module)])


def test_the_recipe_of_nano_uses_of_training_only_the_learning_rate():
    recipe = {name for name in modules() if name.startswith("nano.")}
    assert recipe
    for name in recipe:
        assert modules_used(modules()[name]) <= {*ABOVE_NANO, "training.optim", *recipe}, name


def test_nothing_else_uses_the_recipe_of_nano():
    outside = [file for name, file in modules().items() if not name.startswith("nano.")]
    for file in (*outside, ROOT / "train.py", ROOT / "generate.py"):
        assert not any(name.startswith("phogpt_raw.nano") for name in imported(file)), file


def test_the_loop_is_written_by_hand():
    files = [*PACKAGE.rglob("*.py"), ROOT / "train.py", ROOT / "generate.py"]
    for file in files:
        for name in imported(file):
            assert "Trainer" not in name.split(".")[-1] or name.startswith("tokenizers."), file
            assert name.split(".")[0] not in ("accelerate", "trl", "lightning", "deepspeed"), file


def test_the_package_itself_offers_load_base_alone():
    import phogpt_raw

    assert phogpt_raw.__all__ == ["load_base"]
    assert modules_used(PACKAGE / "__init__.py") == {"model.weights"}


def test_this_test_sees_an_import_wherever_it_stands(tmp_path):
    file = tmp_path / "m.py"
    file.write_text("def f():\n    from phogpt_raw.show import console\n"
                    "    import phogpt_raw.model.cache\n"
                    "from phogpt_raw.training.step import train_step\n")
    assert modules_used(file) == {"show.console", "model.cache", "training.step"}
