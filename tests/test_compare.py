"""bench/compare.py writes the tables of README and docs/ from the files in bench/results."""

import json

import pytest

from bench import command_line, compare, simulated
from bench import results as results_module
from bench.command_line import Setting

T4 = {"name": "Tesla T4", "device": "cuda", "capability": [7, 5], "memory_gib": 14.56}
H200 = {"name": "NVIDIA H200", "device": "cuda", "capability": [9, 0], "memory_gib": 139.8}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Make a folder of results and a README with one table.

    Returns a function that saves a result in the folder.
    """
    monkeypatch.setattr(results_module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("# A\n<!-- table: memory -->\nold\n<!-- end -->\nB\n")

    def save(what, source, card, rows, day="2026-01-01", **more):
        name = f"{what}-{source}-{card['name']}-{more.get('model', '7b5')}-{day}.json"
        result = {"what": what, "source": source, "card": card, "label": None, "model": "7b5",
                  "dtype": "fp16", "attention": "auto", "rows": rows} | more
        (tmp_path / "results" / name).write_text(json.dumps(result))

    return save


def row(seq_len, gib, blocks=0, fits=True, **more):
    return {"seq_len": seq_len, "micro_batch": 1, "accumulate": 1, "recompute": "auto",
            "blocks_recomputed": blocks, "fits": fits, "device_gib": gib} | more


def measured(seq_len, allocated, simulated, recompute="none"):
    peak = {"allocated": allocated, "reserved": allocated + 1, "device": allocated + 2}
    return {"seq_len": seq_len, "micro_batch": 1, "accumulate": 1, "recompute": recompute,
            "rank": 16, "fits": True, "peak_gib": {"forward": peak, "clip": dict.fromkeys(peak, 0)},
            "graphs_reserved_gib": allocated + 1.5,
            "simulated": {"allocated_gib": simulated, "reserved_gib": allocated + 1}}


def test_tables_are_written_between_their_markers_and_nothing_else_changes(results, tmp_path,
                                                                           capsys):
    results("memory", "simulated", T4, [row(512, 7.77), row(8192, 13.6, 25), row(9, 99, 32, False)])
    compare.main([])
    assert (tmp_path / "README.md").read_text().splitlines() == [
        "# A", "<!-- table: memory -->", "| tokens | 7B5, T4, simulated |", "|---|---|",
        "| 9 | does not fit |", "| 512 | 7.8 |", "| 8,192 | 13.6 (25) |", "<!-- end -->", "B"]
    assert "README.md: tables written" in capsys.readouterr().out
    compare.main(["--check"])
    assert "agrees with bench/results" in capsys.readouterr().out


def test_documents_beside_the_readme_have_tables_too(results, tmp_path, capsys):
    results("memory", "simulated", T4, [row(512, 7.77)])
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("<!-- table: memory -->\n<!-- end -->\n")
    compare.main([])
    assert "| 512 | 7.8 |" in (tmp_path / "docs" / "a.md").read_text()


def test_a_table_that_differs_fails_the_check_and_stays_as_it_is(results, tmp_path, capsys):
    results("memory", "simulated", T4, [row(512, 7.77)])
    compare.main([])
    file = tmp_path / "README.md"
    file.write_text(changed := file.read_text().replace("7.8", "7.7"))
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--check"])
    assert stopped.value.code == 2 and file.read_text() == changed
    assert "README.md: a table differs from bench/results; run python bench/compare.py" in (
        " ".join(capsys.readouterr().err.split()))


def test_a_measured_card_is_a_column_of_its_own_beside_the_simulated(results):
    results("memory", "simulated", T4, [row(512, 7.77)])
    results("memory", "measured", T4, [measured(512, 5.5, 5.4), measured(512, 5.1, 5.1, "all")])
    assert compare.across("memory", compare.memory_cell) == [
        "| tokens | 7B5, T4, measured | 7B5, T4, simulated |", "|---|---|---|",
        "| 512 | 7.5 | 7.8 |"]


@pytest.mark.parametrize("more", [
    {"label": "judged-a"}, {"cap_gib": 14.56}, {"attention": "efficient"}, {"model": "nano"},
    {"optimizer": "adamw"}, {"rows": [measured(512, 5.5, 5.4) | {"rank": 64}]}])
def test_what_is_no_column_stays_out(results, more):
    results("memory", "measured", T4, **{"rows": [measured(512, 5.5, 5.4)]} | more)
    assert compare.columns("memory") == {}


def test_another_dtype_and_another_size_of_a_card_are_columns_of_their_own(results):
    for name, dtype in (("Tesla V100-SXM2-16GB", "fp16"), ("Tesla V100-SXM2-32GB", "fp16"),
                        ("NVIDIA L4", "bf16")):
        results("memory", "measured", T4 | {"name": name}, [measured(512, 5.5, 5.4)], dtype=dtype)
    assert [card for _, card in compare.columns("memory")] == [
        "L4 bf16, measured", "V100 16GB, measured", "V100 32GB, measured"]


def test_a_column_is_of_one_row_at_a_time(results):
    results("memory", "simulated", T4, [row(512, 1.0), row(512, 9.0) | {"micro_batch": 4},
                                        row(1024, 9.0) | {"accumulate": 2}])
    assert compare.across("memory", compare.memory_cell)[2:] == ["| 512 | 1.0 |"]


def test_a_simulation_that_fails_is_one_line_and_the_old_ones_stay(results, tmp_path, monkeypatch,
                                                                   capsys):
    results("memory", "simulated", T4, [row(512, 7.77)])
    before = list((tmp_path / "results").iterdir())
    with pytest.raises(SystemExit) as stopped:  # the folder has no benchmarks
        compare.main(["--simulate"])
    assert stopped.value.code == 2
    assert "failed; see its error above" in " ".join(capsys.readouterr().err.split())
    assert list((tmp_path / "results").iterdir()) == before


def test_a_card_that_nobody_rents_for_this_has_no_column(results):
    results("memory", "measured", H200, [measured(512, 5.5, 5.4)])
    assert compare.columns("memory") == {}


def test_the_newest_result_of_a_card_counts(results):
    for day, gib in (("2026-01-02", 2.0), ("2026-01-03", 3.0), ("2026-01-01", 1.0)):
        results("memory", "simulated", T4, [row(512, gib)], day)
    [rows] = compare.columns("memory").values()
    assert rows[512]["device_gib"] == 3.0


def test_seconds_are_a_range_where_simulated_and_a_number_where_measured(results):
    assert compare.time_cell({"fits": True, "example_s": [0.52, 0.75]}) == "0.52 to 0.75"
    assert compare.time_cell({"fits": True, "step_s": 0.61}) == "0.61"
    assert compare.time_cell({"fits": False}) == "does not fit"


def test_a_file_shows_its_worst_setting(results):
    results("memory", "measured", H200, [measured(512, 10, 10.1), measured(1024, 10, 9.8)],
            label="judged-a")
    assert compare.held_memory()[2:] == [
        "| H200 | 7B5 | fp16 | 16 | 2 | -2.0% | +0.0% | 1.50 to 1.50 GiB |"]
    rows = [{"micro_batch": 1, "seq_len": 512, "fits": True, "step_s": 1.0, "simulated_s": s}
            for s in (1.01, 0.9, 1.05)]
    results("step_time", "measured", H200, rows, label="tuned-b")
    assert compare.held_time()[2:] == ["| H200 | 7B5 | fp16 | 1 x 512 | 3 | tuning | -10.0% |"]


@pytest.mark.parametrize("text, line", [
    ("<!-- table: speed -->\n<!-- end -->\n", "README.md: no table speed; the tables are memory"),
    ("<!-- table: memory -->\n", "README.md: the marker of table memory has no <!-- end -->"),
])
def test_a_bad_marker_is_one_line(results, tmp_path, capsys, text, line):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        compare.main([])
    assert stopped.value.code == 2
    assert line in " ".join(capsys.readouterr().err.split())


def test_the_readme_is_as_the_results_have_it(capsys):
    compare.main(["--check"])


def test_the_saved_simulation_is_what_the_code_says_today():
    """If this test fails, run `python bench/compare.py --simulate`.

    Other versions of torch may change the values by up to 1 %.
    """
    asked = command_line.parse(command_line.parser(""), ["--model", "4b", "--card", "t4"])
    [(card, rates, traces)] = simulated.cards(asked)
    found = traces.on(card, Setting(512, 1, 1, "auto"))
    memory = compare.columns("memory")["4b", "T4, simulated"][512]
    assert found.memory_row()["device_gib"] == pytest.approx(memory["device_gib"], rel=0.01)
    time = compare.columns("step_time")["4b", "T4, simulated"][512]
    assert found.time_row(rates)["step_s"] == pytest.approx(time["step_s"], rel=0.01)


def test_every_column_of_the_readme_says_its_source():
    for what in ("memory", "step_time"):
        table = compare.columns(what)
        assert {model for model, _ in table} == {"7b5", "4b"}
        for _, card in table:
            assert card.endswith((", measured", ", simulated"))
