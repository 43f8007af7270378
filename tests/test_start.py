"""`generate.py --serve`: flags that cannot be are refused before anything is loaded."""

import doctest
import socket
import sys

import pytest

import generate
from phogpt_raw.serve import start
from phogpt_raw.serve.start import address, bind

pytest.importorskip("uvicorn")


@pytest.fixture
def refused(capsys, monkeypatch):
    """A function that runs generate.py and returns its one line of error."""
    monkeypatch.setattr(start, "load", lambda *_: pytest.fail("weights were read"))

    def run(*flags):
        with pytest.raises(SystemExit) as left:
            generate.main([str(flag) for flag in flags])
        said = capsys.readouterr()
        assert left.value.code == 2 and said.out == "" and said.err.count("\n") == 1, said.err
        return said.err

    return run


def test_doctest():
    assert doctest.testmod(start).failed == 0


@pytest.mark.parametrize("text", ["", "a", ":8000", "70000", "1.2.3.4", "::1:80", "[::1]", "-1",
                                  "８０００", "a:b:80", "[::1:80", "80 "])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(start.Refusal, match="is not PORT or HOST:PORT"):
        address(text)


def test_an_address_that_cannot_be_had_is_refused():
    with pytest.raises(start.Refusal, match="cannot be listened on"):
        bind("203.0.113.7", 8000)  # of no computer
    with pytest.raises(start.Refusal, match="cannot be listened on"):
        bind("no-such-host.invalid", 8000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(start.Refusal, match="choose another"):
            bind(*taken.getsockname())


@pytest.mark.parametrize("flags, said", [
    (["--serve", "0", "Phở?"], "what to ask?"),
    ([], "what to ask?"),
    (["--slots", "2", "Phở?"], "--slots: has no effect here"),
    (["--api-key", "a", "Phở?"], "--api-key: has no effect here"),
    (["--adapter", "a=b", "--adapter", "c", "Phở?"], "several are for --serve"),
    (["--serve", "0", "--slots", "0"], "--slots 0"),
    (["--serve", "0", "--api-key", "mở ra"], "--api-key: must be letters"),
    (["--serve", "0", "--api-key", ""], "--api-key: must be letters"),
    (["--serve", "0", "--seed", "5", "--temperature", "1"], "each request names its own"),
    (["--serve", "0", "--temperature", "-1"], "--temperature -1"),
    (["--serve", "0", "--adapter", "a=/no/such"], "/no/such/adapter_config.json: missing"),
    (["--serve", "0", "--model", "/no/such"], "no such folder"),
])
def test_flags_that_cannot_be_are_refused(refused, flags, said):
    assert said in refused(*flags)


@pytest.mark.parametrize("package", ["uvicorn", "starlette"])
def test_a_missing_extra_is_named(refused, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"--serve: needs {package}; pip install" in refused("--serve", "0")


def test_without_the_extra_the_package_is_imported_and_a_question_answered(tiny, capsys,
                                                                           monkeypatch):
    for package in ("uvicorn", "starlette"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "phogpt_raw.serve.app", raising=False)
    generate.main(["--model", str(tiny), "--max-new-tokens", "2", "Phở?"])
    assert capsys.readouterr().out.strip()
