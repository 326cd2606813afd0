r"""Which tokens of a prompt are its dialogue, and which its template's.

Nothing is searched for: what users write may be what templates write ("user", "assistant"),
templates may trim it, and tokenizers may join it with what stands beside it. The conversation is
read once more with another text in a message's place, and what stays the same in front of that
message and behind it is not its own. A token that holds text of both is the message's.
Blanks between the two are no text, and count as either's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from captum_dcam.model.prompts import Messages

#: who takes part in a dialogue; a system message tells them how
SPEAKERS = ("user", "assistant")
#: texts in a message's place, no token of which is the first or the last of both: what a message
#: shares with one of them by chance, it does not share with the other
STAND_INS = ("a", "is")


def told_apart(
    messages: Messages, ids_of: Callable[[Messages], Sequence[int]]
) -> tuple[list[int], list[bool]]:
    r"""The ids of a conversation, and which of them are of its dialogue.

    Args:
        messages (list of dict): as :func:`~captum_dcam.model.prompts.messages_of` returns them.
        ids_of (callable): messages to the L ids of all that the model reads, by template and
            tokenizer.

    Returns:
        tuple: the L ids, and L times whether a token holds text of a user's or an assistant's
        message.
    """
    ids = list(ids_of(messages))
    said = [False] * len(ids)
    for others in _replaced(messages):
        read = [list(ids_of(other)) for other in others]
        start = min(_shared(ids, other) for other in read)
        end = len(ids) - min(_shared(ids[::-1], other[::-1]) for other in read)
        said[start:end] = [True] * max(end - start, 0)
    return ids, said


def _replaced(messages: Messages) -> Iterator[list[Messages]]:
    """For every text of the dialogue the conversations with each stand-in in its place, between the
    text's own blanks: what these are joined with stays the same."""
    for m, message in enumerate(messages):
        for p, part in enumerate(message["content"]):
            text = part["text"].strip() if part["type"] == "text" else ""
            if text and message["role"] in SPEAKERS:
                front, behind = part["text"].split(text, 1)
                yield [_with(messages, m, p, f"{front}{other}{behind}") for other in STAND_INS]


def _with(messages: Messages, number: int, place: int, text: str) -> Messages:
    """The messages with another text as one part of one of them."""
    content = list(messages[number]["content"])
    content[place] = {**content[place], "text": text}
    return [
        {**message, "content": content} if n == number else message
        for n, message in enumerate(messages)
    ]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
