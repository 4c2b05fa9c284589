"""What is too long: as much is drawn in its place as the source has, and it is counted."""

from r1pipe.chat.template import Chat
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Prompt
from r1pipe.data.source import MOST, draw_prompts_that_fit, prompt_fits


def test_where_all_fits_the_source_is_asked_once_for_as_much_as_is_wanted():
    asked = []

    def draw(n):
        asked.append(n)
        return list(range(n))

    assert draw_prompts_that_fit(draw, 5, lambda item: True) == ([0, 1, 2, 3, 4], 0)
    assert draw_prompts_that_fit(draw, 0, lambda item: True) == ([], 0)
    assert asked == [5, 0]


def test_more_is_drawn_until_enough_fit_and_what_was_passed_over_is_counted():
    assert draw_prompts_that_fit(lambda n: list(range(n)), 3, lambda item: item % 5 == 4) == ([4, 9, 14], 12)


def test_a_source_that_ends_gives_fewer_and_an_endless_one_is_given_up():
    assert draw_prompts_that_fit(lambda n: list(range(min(n, 20))), 8, lambda item: item % 5 == 4) == (
        [4, 9, 14, 19],
        16,
    )
    assert draw_prompts_that_fit(lambda n: list(range(n)), 2, lambda item: False) == ([], 2 * MOST)


def test_a_prompt_leaves_room_for_its_answer_or_not():
    chat = Chat.load(content_dir() / "tokenizer")
    prompt = Prompt("p", "word", "en", "What is 1 plus 1?")
    tokens = len(chat.prompt_tokens(prompt))
    assert prompt_fits(chat, tokens + 10, 10)(prompt) and not prompt_fits(chat, tokens + 9, 10)(prompt)
