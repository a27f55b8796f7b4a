"""The one hierarchy of errors and the one form of their sentences.

Every mistake that a user can make is a `MegaseqError`; the command line prints its text and exits 2. The sentence is
`<path or operation>: must <rule>, but is <value>. <remedy>.`
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar, overload


class MegaseqError(Exception):
    """A mistake that a person can mend; its text is one complete sentence per line."""


class ParamsError(MegaseqError):
    """Params of a wrong name, type or value."""


class UnknownParamError(ParamsError, AttributeError):
    """A param that does not exist; also an AttributeError, so that `hasattr` and `getattr` with a default work."""


class RegistryError(MegaseqError):
    """An experiment that is not registered, or is registered twice."""


class DataError(MegaseqError):
    """A file, example or batch that cannot be used."""


class CheckpointError(MegaseqError):
    """A checkpoint that is missing, damaged or of another model."""


class TrainingError(MegaseqError):
    """A run that cannot go on."""


class MissingPackageError(MegaseqError, ImportError):
    """An optional package that is not installed."""


def shown(value: object) -> str:
    """Writes `value` for a sentence: `repr`, cut in the middle when it is longer than 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-30:]}"


def sentence(path: str, rule: str, value: object, remedy: str) -> str:
    """Builds `<path>: must <rule>, but is <value>. <remedy>.`; each part may be empty except `path` and `rule`.

    Args:
        path: What is wrong: a params path, an operation, or a file and line.
        rule: What must hold, without the word must: "be positive".
        value: What is there instead; shown by `repr`, or as it is when it is an `AsText`.
        remedy: What to do about it, a sentence with or without its full stop.
    """
    tail = f" {remedy.rstrip().rstrip('.')}" if remedy else ""
    tail += "." if tail and tail[-1] not in "?!" else ""
    return f"{path}: must {rule}, but is {value if isinstance(value, AsText) else shown(value)}.{tail}"


class AsText(str):
    """A value of `must` that is printed as it is, without quotes: `AsText("missing")`."""


ErrorT = TypeVar("ErrorT", bound=MegaseqError)


@overload
def must(path: str, rule: str, value: object, remedy: str = "") -> ParamsError: ...
@overload
def must(path: str, rule: str, value: object, remedy: str = "", *, kind: type[ErrorT]) -> ErrorT: ...
def must(
    path: str, rule: str, value: object, remedy: str = "", *, kind: type[MegaseqError] = ParamsError
) -> MegaseqError:
    """Returns (does not raise) the error `<path>: must <rule>, but is <value>. <remedy>.`

    Example: `raise must("train.max_steps", "be positive", -1, "Set it to at least 1")`.
    """
    return kind(sentence(path, rule, value, remedy))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One broken rule of params, as `check` lists it."""

    path: str
    """Of the param; `validate` gives it relative to its own params."""
    rule: str
    """What must hold, without the word must."""
    value: object
    """What is there instead."""
    remedy: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        return sentence(self.path, self.rule, self.value, self.remedy)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Says which of the `known` names was probably meant: `did you mean hidden_dim?`, or lists them all."""
    names = sorted(set(known))
    if not names:
        return "there is none"
    by_lower_case = {candidate.lower(): candidate for candidate in reversed(names)}
    # Names of up to four letters share few of them with a misspelling: one wrong letter of two is a ratio of 0.5.
    cutoff = 0.6 if len(name) > 4 else 0.45
    close = difflib.get_close_matches(name.lower(), list(by_lower_case), n=3, cutoff=cutoff)
    if not close:
        return f"it has {', '.join(names)}"
    best = difflib.SequenceMatcher(a=name.lower(), b=close[0]).ratio()
    good = [by_lower_case[c] for c in close if difflib.SequenceMatcher(a=name.lower(), b=c).ratio() > best - 0.05]
    return f"did you mean {' or '.join(good)}?"
