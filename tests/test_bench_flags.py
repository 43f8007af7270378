"""An invalid number for a benchmark is refused in one line, before anything is computed."""

import doctest

import pytest

from bench import (
    command_line,
    compare,
    data,
    decode,
    epoch,
    memory,
    peer,
    products,
    saving,
    serve,
    step_time,
)

GRID = ["--seq-len", "--micro-batch", "--accumulate", "--documents", "--rank", "--loss-mib",
        "--cap"]
FLAGS = {
    memory: [*GRID, "--recompute"],
    step_time: [*GRID, "--recompute", "--steps", "--warmup", "--epochs", "--batch-tokens",
                "--max-len"],
    decode: ["--prompt", "--batch", "--new", "--rank"],
    epoch: ["--max-len", "--rank", "--batch-tokens", "--recompute", "--loss-mib", "--epochs",
            "--trainer", "--pairs", "--cap"],
    peer: ["--work", "--cap", "--recompute", "--rank", "--loss-mib", "--losses", "--pairs",
           "--steps", "--warmup"],
    products: ["--rows"],
    saving: ["--steps", "--every", "--rank"],
    serve: ["--clients", "--prompt", "--new", "--rank"],
    data: ["--rows"],
}


@pytest.mark.parametrize("bench, flag", [
    pytest.param(bench, flag, id=f"{bench.__name__} {flag}")
    for bench, flags in FLAGS.items() for flag in flags])
def test_a_number_that_cannot_be_is_refused_in_one_line(bench, flag, capsys):
    for value in ("-1", "nan", "inf", "1e400", "", f"1{'0' * 18}"):
        if flag == "--recompute" and value.startswith("10"):
            continue  # refused later, because the limit depends on the model
        with pytest.raises(SystemExit) as stopped:
            bench.main([f"{flag}={value}"])
        said = capsys.readouterr()
        assert stopped.value.code == 2 and not said.out, (value, said)
        assert said.err.startswith("error: ") and said.err.count("\n") == 1, (value, said)
        assert flag in said.err


def test_the_examples_of_the_types_of_flags():
    assert doctest.testmod(command_line).failed == 0


@pytest.mark.parametrize("bench", [compare, data, decode, epoch, memory, peer, products, saving,
                                   serve, step_time])
def test_help_fits_80_columns(bench, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--help"])
    said = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and said[0].endswith(" [options]")
    assert [line for line in said if len(line) > 80] == []
