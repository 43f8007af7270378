"""The report's counts of rows and lengths. The expected values are counted by hand."""

import doctest

from conftest import example

from phogpt_raw.data import report as module
from phogpt_raw.data.encoded import Encoded
from phogpt_raw.data.records import Bad, Findings
from phogpt_raw.data.report import edges_for, lengths_of, report


def documents(*lengths):
    return [example(list(range(5, 5 + n)), 2, f"f:{n}") for n in lengths]


def test_doctest():
    assert doctest.testmod(module).failed == 0


def test_lengths_are_counted_in_bins_that_hold_all():
    found = lengths_of(documents(*range(3, 103)))
    assert (found.total, found.supervised) == (sum(range(3, 103)), 200)
    assert (found.median, found.most, found.longest) == (52, 97, 102)
    assert sum(found.counts) == 100 and len(found.counts) == len(found.edges)
    assert found.edges[0] == 10 and found.counts[0] == 8  # lengths 3 to 10
    assert found.counts[-1] == 2 and found.edges[-1] == 110  # lengths 101 and 102


def test_there_are_few_bins_whatever_the_longest():
    for longest in (1, 2, 12, 13, 99, 100, 1023, 8192, 10**6):
        edges = edges_for(longest)
        assert 1 <= len(edges) <= module.BINS and edges[-1] >= longest
        assert len(edges) == 1 or edges[-2] < longest


def test_duplicates_and_the_share_that_fits_are_of_rows():
    findings = Findings(good=8, bad=[Bad("f:9", "is empty")])
    findings.note("cut", "f:1")
    findings.note("split", "f:2")
    rows = [Encoded(tuple(documents(5, 6)), hashed) for hashed in (1, 2, 2, 2, 3, 4, 5)]
    found = report(rows, findings)
    assert (found.rows, found.duplicates, found.fits) == (7, 2, 0.75)
