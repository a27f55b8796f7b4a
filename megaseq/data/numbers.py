"""Numbers, dates and times written out in English, with their exact German and French translations.

An endless data set without a licence: example `index` is a pure function of (seed, index). Values are split by a hash
of the value itself, so a held-out value occurs in training in no language and at no index. `num2words` writes the
numerals; what stands around them (months, "Uhr", "heures", a.m. and p.m.) is written here.
"""

from __future__ import annotations

import calendar
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from megaseq.base import optional
from megaseq.data.source import GeneratedSource

Kind = Literal["number", "date", "time"]
Language = Literal["en", "de", "fr"]

TARGET_LANGUAGES: tuple[Language, ...] = ("de", "fr")
TAGS: tuple[str, ...] = tuple(f"<{language}>" for language in TARGET_LANGUAGES)

HELD_OUT_ONE_IN = 25
"""One value in this many is held out of training."""
LEXICON_BELOW = 100
"""Smaller numbers are the words all others are made of, so they are never held out."""

_MONTHS: dict[Language, tuple[str, ...]] = {
    "en": ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December"),
    "de": ("Januar", "Februar", "März", "April", "Mai", "Juni", "Juli", "August", "September", "Oktober", "November",
           "Dezember"),
    "fr": ("janvier", "février", "mars", "avril", "mai", "juin", "juillet", "août", "septembre", "octobre", "novembre",
           "décembre"),
}  # fmt: skip
_MASK = (1 << 64) - 1


class Value(NamedTuple):
    """What a sentence says: `numbers` is (n,), (year, month, day) or (hour, minute)."""

    kind: Kind
    numbers: tuple[int, ...]


class Example(NamedTuple):
    """A value and the language it is translated to."""

    value: Value
    language: Language


def example(index: int, *, seed: int, held_out: bool) -> Example:
    """The `index`-th example of the training (or held-out) stream of `seed`."""
    for draw in _draws(seed, index):
        candidate = _value(draw)
        if is_held_out(candidate) == held_out:
            return Example(candidate, TARGET_LANGUAGES[(draw >> 60) % len(TARGET_LANGUAGES)])
    raise AssertionError("unreachable: the stream of draws is endless")


def is_held_out(value: Value) -> bool:
    """Whether training never shows `value`; depends on nothing but the value."""
    if value.kind == "number" and value.numbers[0] < LEXICON_BELOW:
        return False
    state = {"number": 11, "date": 12, "time": 13}[value.kind]
    for number in value.numbers:
        state = _mix(state + number)
    return state % HELD_OUT_ONE_IN == 0


def source_text(example: Example) -> str:
    """The English sentence, led by the tag of the target language: `<de> four hundred`."""
    return f"<{example.language}> {write(example.value, language='en')}"


def target_text(example: Example) -> str:
    """The one right translation."""
    return write(example.value, language=example.language)


def write(value: Value, *, language: Language) -> str:
    """Writes `value` out in words of `language`."""
    if value.kind == "number":
        return _cardinal(value.numbers[0], language)
    if value.kind == "date":
        year, month, day = value.numbers
        return _date(year, month, day, language)
    hour, minute = value.numbers
    return _time(hour, minute, language)


def _draws(seed: int, index: int) -> Iterator[int]:
    """Endless 64-bit draws that belong to (seed, index) alone."""
    state = _mix(_mix(seed + 0x5EED) ^ index)
    while True:
        state = _mix(state)
        yield state


def _mix(state: int) -> int:
    """The SplitMix64 output function (Steele, Lea, Flood 2014)."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def _value(draw: int) -> Value:
    """Half of all values are numbers of one to six digits, three in ten are dates, two in ten are times."""
    which, rest = draw % 10, (draw // 10) % (1 << 40)
    if which < 5:
        digits = 1 + rest % 6
        low = 0 if digits == 1 else 10 ** (digits - 1)
        return Value("number", (low + (rest // 6) % (10**digits - low),))
    if which < 8:
        year = 1900 + rest % 200
        month = 1 + (rest // 200) % 12
        day = 1 + (rest // 2400) % calendar.monthrange(year, month)[1]
        return Value("date", (year, month, day))
    return Value("time", (rest % 24, (rest // 24) % 60))


@functools.lru_cache(maxsize=1 << 14)
def _words(number: int, language: Language, form: str = "cardinal") -> str:
    return str(_library().num2words(number, lang=language, to=form))


@functools.cache
def _library() -> Any:
    return optional("num2words", needed_for="numbers written out in words")


def _cardinal(number: int, language: Language) -> str:
    return _words(number, language)


def _date(year: int, month: int, day: int, language: Language) -> str:
    name, spoken_year = _MONTHS[language][month - 1], _words(year, language, "year")
    if language == "en":
        return f"{name} the {_words(day, language, 'ordinal')}, {spoken_year}"
    if language == "de":
        return f"der {_words(day, language, 'ordinal')} {name} {spoken_year}"
    return f"le {'premier' if day == 1 else _words(day, language)} {name} {spoken_year}"


def _time(hour: int, minute: int, language: Language) -> str:
    if language == "en":
        clock = [_words((hour + 11) % 12 + 1, "en")]
        if 0 < minute < 10:
            clock.append("oh")
        if minute:
            clock.append(_words(minute, "en"))
        return " ".join([*clock, "a.m." if hour < 12 else "p.m."])
    if language == "de":
        spoken_hour = "ein" if hour == 1 else _words(hour, "de")
        return f"{spoken_hour} Uhr {_words(minute, 'de')}" if minute else f"{spoken_hour} Uhr"
    # Hours and minutes are feminine in French: une heure, vingt et une heures.
    spoken = f"{_feminine(_words(hour, 'fr'))} {'heure' if hour < 2 else 'heures'}"
    return f"{spoken} {_feminine(_words(minute, 'fr'))}" if minute else spoken


def _feminine(numeral: str) -> str:
    return f"{numeral}e" if numeral == "un" or numeral.endswith(" un") else numeral


class Numbers(GeneratedSource):
    """The training or the held-out stream as a source of pairs: `<de> twenty-one` and `einundzwanzig`."""

    class Params(GeneratedSource.Params):
        seed: int = 1
        """Chooses the stream of values."""
        held_out: bool = False
        """Whether these are the values that training never shows."""

    params: Params

    def pairs(self, start: int, stop: int) -> list[tuple[str, str]]:
        """Returns the (source, target) texts of examples `start` to `stop` of the stream."""
        p = self.params
        examples = (example(index, seed=p.seed, held_out=p.held_out) for index in range(start, stop))
        return [(source_text(item), target_text(item)) for item in examples]
