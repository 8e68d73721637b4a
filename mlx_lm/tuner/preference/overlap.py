"""What a prompt and its responses share as text: where two texts part, and whether responses repeat their prompt."""

import os
import re
import unicodedata

# A shorter prompt may well be repeated by answers that are complete without it: "Hello" and "Hello!".
REPEATED_WORDS = 3


def without_prompt(prompt, chosen, rejected):
    """The two responses without the prompt that both begin with; None where they do not, or where it may be chance."""
    asked = prompt.strip()
    bare = [text.lstrip() if isinstance(text, str) else "" for text in (chosen, rejected)]
    if len(asked.split()) < REPEATED_WORDS or not all(text.startswith(asked) for text in bare):
        return None
    rest = [text[len(asked) :] for text in bare]
    # "It is four" does not repeat "It is fou".
    return rest if all(not text or not _joined(asked[-1], text[0]) for text in rest) else None


def shared_text(chosen, rejected, specials=()):
    """Where the prompt ends that two texts begin with.

    The longest common prefix, cut back until it ends inside no word, no character sequence and none of
    `specials`, leaves something of both texts, and ends in no space: the space goes to the responses,
    whose first tokens most tokenizers write with it.

    Returns:
        The number of characters, 0 where nothing is shared.
    """
    end = len(os.path.commonprefix([chosen, rejected]))
    end = min(end, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    pattern, texts = re.compile("|".join(map(re.escape, specials)) or r"\Z"), (chosen, rejected)
    inside = {i for text in texts for found in pattern.finditer(text) for i in range(found.start() + 1, found.end())}
    while end > 0 and (
        end in inside or chosen[end - 1] == " " or any(_joined(text[end - 1], text[end]) for text in texts)
    ):
        end -= 1
    return max(end, 0)


def _joined(before, after):
    """Whether two neighbouring characters stand in one word or one drawn character."""
    extends = unicodedata.category(after)[0] == "M" or "\u200d" in (before, after)
    return extends or (_of_word(before) and _of_word(after))


def _of_word(character):
    return character.isalnum() or character in "_'’" or unicodedata.category(character)[0] == "M"
