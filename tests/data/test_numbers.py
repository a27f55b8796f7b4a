"""The written-out numbers, dates and times: right words, a pure function of the index, a split that never leaks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.data import numbers
from megaseq.data.numbers import Value

# Written by hand, not by the library under test.
WRITTEN = [
    (Value("number", (0,)), "zero", "null", "zéro"),
    (Value("number", (1,)), "one", "eins", "un"),
    (Value("number", (4217,)), "four thousand, two hundred and seventeen", "viertausendzweihundertsiebzehn",
     "quatre mille deux cent dix-sept"),
    (Value("number", (999_999,)), "nine hundred and ninety-nine thousand, nine hundred and ninety-nine",
     "neunhundertneunundneunzigtausendneunhundertneunundneunzig",
     "neuf cent quatre-vingt-dix-neuf mille neuf cent quatre-vingt-dix-neuf"),
    (Value("date", (1905, 5, 1)), "May the first, nineteen oh-five", "der erste Mai neunzehnhundertfünf",
     "le premier mai mille neuf cent cinq"),
    (Value("date", (2024, 2, 29)), "February the twenty-ninth, twenty twenty-four",
     "der neunundzwanzigste Februar zweitausendvierundzwanzig", "le vingt-neuf février deux mille vingt-quatre"),
    (Value("time", (0, 0)), "twelve a.m.", "null Uhr", "zéro heure"),
    (Value("time", (1, 1)), "one oh one a.m.", "ein Uhr eins", "une heure une"),
    (Value("time", (12, 30)), "twelve thirty p.m.", "zwölf Uhr dreißig", "douze heures trente"),
    (Value("time", (21, 41)), "nine forty-one p.m.", "einundzwanzig Uhr einundvierzig",
     "vingt et une heures quarante et une"),
]  # fmt: skip


@pytest.mark.parametrize("value,english,german,french", WRITTEN, ids=lambda item: str(item)[:40])
def test_words(value: Value, english: str, german: str, french: str) -> None:
    assert numbers.write(value, language="en") == english
    assert numbers.write(value, language="de") == german
    assert numbers.write(value, language="fr") == french


@given(st.integers(0, 2**62), st.integers(0, 2**31), st.booleans())
def test_an_example_is_a_function_of_seed_and_index(index: int, seed: int, held_out: bool) -> None:
    first = numbers.example(index, seed=seed, held_out=held_out)
    assert first == numbers.example(index, seed=seed, held_out=held_out)
    assert numbers.is_held_out(first.value) == held_out


@settings(max_examples=20)
@given(st.integers(0, 2**40), st.integers(0, 2**31))
def test_training_never_shows_a_held_out_value(start: int, seed: int) -> None:
    trained = {numbers.example(start + offset, seed=seed, held_out=False).value for offset in range(300)}
    tested = {numbers.example(start + offset, seed=seed + 1, held_out=True).value for offset in range(50)}
    assert not trained & tested


def test_the_mix_of_kinds_and_languages() -> None:
    examples = [numbers.example(index, seed=3, held_out=False) for index in range(4000)]
    kinds = [example.value.kind for example in examples]
    assert abs(kinds.count("number") / 4000 - 0.5) < 0.03
    assert abs(kinds.count("date") / 4000 - 0.3) < 0.03
    languages = [example.language for example in examples]
    assert abs(languages.count("de") / 4000 - 0.5) < 0.03
    assert len({example.value for example in examples}) > 3000


def test_one_value_in_25_is_held_out_and_the_lexicon_is_not() -> None:
    held_out = [number for number in range(100_000) if numbers.is_held_out(Value("number", (number,)))]
    assert min(held_out) >= numbers.LEXICON_BELOW
    assert abs(len(held_out) / 100_000 - 1 / numbers.HELD_OUT_ONE_IN) < 0.005


def test_texts_carry_the_tag_of_the_target_language() -> None:
    example = numbers.Example(Value("number", (21,)), "fr")
    assert numbers.source_text(example) == "<fr> twenty-one"
    assert numbers.target_text(example) == "vingt et un"
