"""Reasoning in a response: where the text has it, and the text that the model would write behind a prompt.

Prompts leave a thought unopened, open one, or close an empty one; responses hold a whole thought, its end, its
beginning (cut off within it), or none. Chat templates get few of these right, because they are made for turns that are
over.
"""

from typing import NamedTuple


class Thought(NamedTuple):
    """The reasoning of a response.

    Attributes:
        text: the reasoning, without its tags.
        closed: whether it ends within the response.
    """

    text: str
    closed: bool


class Thinking:
    """The tags that open and close a model's reasoning, such as `<think>` and `</think>`; None where it has none."""

    def __init__(self, start, end):
        self.start, self.end = start, end
        self.known = bool(start and end)

    def opened(self, prompt):
        """Whether a prompt ends with the beginning of a thought."""
        return self.known and prompt.rstrip().endswith(self.start)

    def closed(self, prompt):
        """Whether a prompt ends with a thought that is over."""
        return self.known and prompt.rstrip().endswith(self.end)

    def thought(self, content):
        """The `Thought` of a response's content, None where it has none."""
        content = content.strip()
        if not self.known or not (content.startswith(self.start) or self.end in content):
            return None
        before, end, _ = content.rpartition(self.end)
        text = before if end else content
        return Thought(text.strip().removeprefix(self.start).strip(), bool(end))

    def joined(self, reasoning, content):
        """A thought and what follows it as one content."""
        # Gemma 4 writes its answer right behind the channel of its thought.
        gap = "" if self.end == "<channel|>" else "\n\n"
        return f"{self.start}\n{reasoning.strip()}\n{self.end}{gap}{content.lstrip()}"

    def written(self, thought, text, alone):
        """Whether a response's text holds its thought and, where it has one turn alone, no other."""
        ends = thought.text.count(self.end) + thought.closed
        return thought.text in text and (text.count(self.end) == ends or not alone)

    def behind(self, prompt, content):
        """The content as the model writes it behind a prompt, its thought opened once."""
        content = content.strip()
        if not self.opened(prompt):
            return content if content.startswith(self.start) else f"{self.start}\n{content}"
        if content.startswith(self.start):
            # The white space behind the tag that the prompt has already.
            content = content.removeprefix(self.start).removeprefix(prompt[len(prompt.rstrip()) :])
        return content

    def unopened(self, prompt):
        """A prompt without the beginning of a thought at its end."""
        return prompt.rstrip().removesuffix(self.start) if self.opened(prompt) else prompt

    def over(self, prompt, rest):
        """What follows a prompt that opens a thought, where the response has none: its end, then the response.

        `rest` is what the template writes of the response where the thought begins: an empty thought, or none.
        """
        block, end, behind = rest.partition(self.end)
        if end and block.strip() == self.start:
            return end + behind
        return ("" if prompt.endswith("\n\n") else "\n") + self.end + "\n\n" + rest
