"""Words: nothing of a file's reaches a terminal as a command, numbers agree with their nouns."""

import pytest

from latentfm.words import count, listed, shortened, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mRED\x1b]0;TITLE\x07", r"a\x1b[31mRED\x1b]0;TITLE\x07"),
        ("two\nlines\r\tand a tab", r"two\nlines\r\tand a tab"),
        ("\x9b2J and \x7f", r"\x9b2J and \x7f"),
        ("left\u202eright \u2066x\u2069 \u200bhidden\ufeff", r"left\u202eright \u2066x\u2069 \u200bhidden\ufeff"),
        ("a line\u2028more\x85", r"a line\u2028more\x85"),
        ("half \ud83d", r"half \ud83d"),
        ("\U000e0041 tags", r"\U000e0041 tags"),
        ("ein Äpfelchen, 苹果, 🍎, עברית, a\u0301", "ein Äpfelchen, 苹果, 🍎, עברית, a\u0301"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_escapes_and_letters_stay(text, expected):
    assert shown(text) == expected
    assert shown(shown(text)) == shown(text)


def test_long_texts_and_lists_are_cut_and_say_so():
    assert shown("x" * 100, 10) == shortened("x" * 100, 10) == "x" * 7 + "..."
    assert shortened("x" * 10, 10) == "x" * 10
    assert listed(["a", "b"]) == "a, b"
    assert listed("abcdefg") == "a, b, c, d and 3 more"
    assert listed(["a\x1b"] * 3 + ["b"] * 2, most=3) == r"a\x1b, a\x1b, a\x1b and 2 more"


def test_numbers_agree_with_their_nouns():
    assert count(1, "picture") == "1 picture" and count(0, "picture") == "0 pictures" and count(1200, "step") == "1,200 steps"
    assert count(1, "entry", "entries") == "1 entry" and count(2, "entry", "entries") == "2 entries"
