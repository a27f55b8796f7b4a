"""The errors of data: one line that names file and line."""

from __future__ import annotations

from megaseq.base.errors import AsText, DataError, MegaseqError, must


def data_error(where: str, rule: str, found: str, remedy: str) -> MegaseqError:
    """Returns the DataError `<where>: must <rule>, but is <found>. <remedy>.`, where `found` stands as it is."""
    return must(where, rule, AsText(found), remedy, kind=DataError)
