"""Every text that a run shows passes through `_`, as in gettext.

The English text stays in the code that prints it, and is the key of the catalogue. So a second
language needs only one dictionary. Values are filled in by name, after the text is looked up. The
text of a Refusal and the help of the flags stay English.

>>> _("{n:,} rows, median {median:,} tokens", n=1200, median=124)
'1,200 rows, median 124 tokens'
"""

CATALOGUE: dict[str, str] = {}  # English text -> the same text in the language shown


def _(text: str, /, **values) -> str:
    """Return the text in the language shown, and fill `values` into its {fields}."""
    return CATALOGUE.get(text, text).format(**values)


def plural(count: int, one: str, more: str) -> str:
    """Return `one` if the count is 1, else `more`.

    >>> plural(1, _("1 row"), _("{n} rows", n=1)), plural(0, _("1 row"), _("{n} rows", n=0))
    ('1 row', '0 rows')
    """
    return one if count == 1 else more
