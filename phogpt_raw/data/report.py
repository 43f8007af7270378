"""Statistics of the rows of a run, before the first step: counts, lengths and duplicates."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from phogpt_raw.data.encoded import Encoded
from phogpt_raw.data.records import Findings

BINS = 12  # largest number of bins in the histogram


@dataclass(frozen=True)
class Lengths:
    """The lengths of documents in tokens, with a histogram.

    total: the number of tokens in all documents. supervised: the number of tokens that carry loss.
    edges: the upper end of each bin. counts: the number of documents in each bin.
    """

    total: int
    supervised: int
    median: int
    most: int  # 95 % of the documents have at most this length
    shortest: int
    longest: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """The statistics of rows.

    rows, documents: the number of rows and the number of documents. lengths: the lengths of the
    documents. duplicates: the number of rows that repeat an earlier row; upper and lower case and
    the amount of white space are ignored. fits: the share of rows that --max-len does not change.
    """

    rows: int
    documents: int
    lengths: Lengths
    duplicates: int
    fits: float
    findings: Findings


def report(rows: list[Encoded], findings: Findings) -> Report:
    """Return the report of these rows. There must be at least one row."""
    documents = [document for row in rows for document in row.documents]
    changed = sum(findings.notes[kind].count for kind in ("cut", "split", "dropped")
                  if kind in findings.notes)
    repeated = Counter(row.hash for row in rows)
    return Report(len(rows), len(documents), lengths_of(documents), len(rows) - len(repeated),
                  1 - changed / max(1, findings.good), findings)


def lengths_of(documents) -> Lengths:
    sizes = np.array([len(document.ids) for document in documents])
    supervised = sum(document.supervised for document in documents)
    edges = edges_for(int(sizes.max()))
    places = np.searchsorted(edges, sizes)
    counts = np.bincount(places, minlength=len(edges))
    return Lengths(int(sizes.sum()), supervised, int(np.median(sizes)),
                   int(np.percentile(sizes, 95)), int(sizes.min()), int(sizes.max()),
                   tuple(edges), tuple(counts.tolist()))


def edges_for(longest: int) -> list[int]:
    """Return the upper ends of at most BINS bins. All bins have the same width, which is a round
    number.

    >>> edges_for(100), edges_for(1024)[:2], len(edges_for(1024))
    ([10, 20, 30, 40, 50, 60, 70, 80, 90, 100], [100, 200], 11)
    """
    width = next(step * 10**power for power in range(12) for step in (1, 2, 5)
                 if step * 10**power * BINS >= longest)
    return list(range(width, longest + width, width))
