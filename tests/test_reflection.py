"""Reflection by what a text does: a wrong result is changed to the right one."""

import pytest

from r1pipe.core.reflection import corrections, reflects


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("First 12+7=18.\n18-7=11?12 no\nWait, 12+7=19.", [("12+7=18", "12+7=19")]),
        ("12 + 7 = 18, no: 12+7=19", [("12 + 7 = 18", "12+7=19")]),
        ("6+6=12+6=19?18 no 6+6=12+6=18", [("6+6=12+6=19", "6+6=12+6=18")]),
        ("3+4*2=14. 3 + 4 * 2 = 11.", [("3+4*2=14", "3 + 4 * 2 = 11")]),
        ("9÷2=4, 9÷2=4.5; 2×3=5, 2×3=6", [("9÷2=4", "9÷2=4.5"), ("2×3=5", "2×3=6")]),
        ("1+1=3 1+1=4 1+1=2", [("1+1=3", "1+1=2")]),  # from the first error to the first right result
    ],
)
def test_a_mended_result_is_found_with_where_it_stands(text, found):
    assert [(text[slice(*c.wrong)], text[slice(*c.right)]) for c in corrections(text)] == found
    assert reflects(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Wait, let me check: 12+7=19. Yes, 12+7=19.",  # words and a repetition, but nothing was wrong
        "12+7=18. 12+7=17.",  # never right
        "12+7=19. 12+7=18.",  # right, then wrong
        "12+7=18. 12+8=20.",  # another calculation
        "25+14=38+9=47?17 no\n25+14=39-9=30?17 no",  # a search goes on; no calculation is repeated
        "6/0=3 6/0=4",
        "1" * 200_000,
    ],
)
def test_anything_else_is_no_reflection(text):
    assert not reflects(text)


GAME = {"numbers": [9, 25, 3], "target": 19}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("25+9=34-3=31?19 no\n25-9=16+3=19?19 yes", [("25+9=34-3=31", "25-9=16+3=19")]),
        ("25 - 9 - 3 = 13, not 19. So 25 - 9 + 3 = 19.", [("25 - 9 - 3 = 13", "25 - 9 + 3 = 19")]),
        ("25+9+3=37 25-9-3=13 3+25-9=19 25-9+3=19", [("25+9+3=37", "3+25-9=19")]),
        ("25-9=16+3=19?19 yes", []),  # right at once
        ("25+9=34-3=31?19 no\n25-9=16-3=13?19 no\nI give up.", []),
        ("I think of 25+9-3. No, of 25-9+3.", []),  # nothing is worked out
        ("25+9=34. 25-9=16+3=19", []),  # not a try: a number is missing
        ("25-9=16+3=19 25+9=34-3=31", []),  # the right one was given up
        ("25+9=34-3=31 25-9=16+3=18", []),  # right, but not found to be
    ],
)
def test_a_try_that_misses_and_a_later_one_that_hits(text, found):
    assert [(text[slice(*c.wrong)], text[slice(*c.right)]) for c in corrections(text, GAME)] == found
