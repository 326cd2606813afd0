"""Tokens and their text, for any tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from captum_dcam.errors import InputError
from captum_dcam.model.prompts import Messages


class SpecialIds(NamedTuple):
    """Ids of LLaDA's vocabulary, and of those built on it, which its decoders know by number."""

    mask: int = 126336
    bos: int = 126080
    eos: int = 126081
    header: int = 126346
    header_end: int = 126347
    turn_end: int = 126348


LLADA = SpecialIds()
#: by these many families' prompts place images and videos
SIGNS = ("<image>", "<video>")
#: what an incomplete UTF-8 sequence decodes to
BROKEN = "\N{REPLACEMENT CHARACTER}"


class Words:
    r"""Text of single tokens, with the blank that a tokenizer puts in front of a word.

    Decoding a token alone loses it in sentencepiece vocabularies, which strip a text's first blank;
    so every token is decoded behind an anchor.

    Args:
        tokenizer (object): of the family.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._anchor = self._ids("a")[-1:]
        self._before = self._decode([])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            [*self._anchor, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Text of every token; a character in several tokens is told by the last of them."""
        out: list[str] = []
        open_: list[int] = []  # tokens of characters of which the last is not complete
        before = waiting = 0  # characters that are; tokens since the last one was completed
        for number in map(int, ids):
            text = self._text([*open_, number])
            if open_ and BROKEN in text.rstrip(BROKEN):
                out[-1], open_ = self._broken(open_), []  # what was open is no character
                text = self._text([number])
            complete = len(text.rstrip(BROKEN))
            waiting = 1 if not open_ or complete > before else waiting + 1
            open_, before = [*open_, number], complete
            whole = not text.endswith(BROKEN) or waiting == 4  # at most 4 bytes per character
            out.append(text if whole else "")
            open_ = [] if whole else open_
        if open_:
            out[-1] = self._broken(open_)
        return out

    def _broken(self, ids: Sequence[int]) -> str:
        """Text of tokens that end inside a character: what is whole, and one sign for the rest."""
        return self._text(ids).rstrip(BROKEN) + BROKEN

    def _text(self, ids: Sequence[int]) -> str:
        return self._decode(ids).removeprefix(self._before)

    def encode(self, text: str) -> list[int]:
        """Ids of a text: joining their texts gives it back."""
        ids = self._ids(text)
        if text.startswith(" ") and "".join(self.token_texts(ids)) != text:
            return self._ids(text[1:])  # the tokenizer puts a blank in front by itself
        return ids


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of markers: special tokens, and added ones that stand for something else than text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset((*tokenizer.all_special_ids, *(i for i, t in added.items() if t.special)))


def special_texts(tokenizer: Any, *more: int | None) -> tuple[str, ...]:
    """What special tokens, and ``more`` of them by their ids, read as: the longest first."""
    ids = sorted({*special_ids(tokenizer), *(i for i in more if i is not None)})
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    texts = convert(ids) if convert else [tokenizer.decode([i]) for i in ids]
    return tuple(sorted({t.strip() for t in texts if t and t.strip()}, key=lambda t: (-len(t), t)))


def check_prompt(
    prompt: str | Messages, special: Collection[str], signs: Collection[str] = SIGNS
) -> None:
    r"""InputError for a prompt whose text a tokenizer would read as something else.

    Args:
        prompt (str or list of dict): a text, or messages as
            :func:`~captum_dcam.model.prompts.messages_of` returns them.
        special (collection of str): from :func:`special_texts`.
        signs (collection of str, optional): what stands for an image. Default: the signs that many
            families' prompts have
    """
    texts = [prompt] if isinstance(prompt, str) else []
    for message in () if isinstance(prompt, str) else prompt:
        # parts side by side are one text
        texts.append("".join(p.get("text", "\0") for p in message["content"]))
    for sign in signs:
        if any(sign in text for text in texts):
            raise InputError(
                f"the prompt holds {sign}, which stands for an image: leave it out, images are "
                "placed by themselves, or by parts {'type': 'image'} of a conversation"
            )
    for token in special:
        if any(token in text for text in texts):
            raise InputError(
                f"the prompt holds {token}, which the model would read as a special token and not "
                "as text: leave it out or spell it otherwise; roles and turns are written by "
                "themselves"
            )
