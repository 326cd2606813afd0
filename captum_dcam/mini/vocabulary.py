"""The embedded model's words and its fast tokenizer."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from captum_dcam.data.language import vocabulary
from captum_dcam.data.scenes import COLORS, SHAPES

SPECIAL = ("<pad>", "<mask>", "<eos>", "<image>", "<answer>", "<unk>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level fast tokenizer; special tokens first, then the words in alphabetical order."""
    words = [*SPECIAL, *vocabulary(tuple(COLORS), SHAPES)]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = Lowercase()
    core.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        mask_token="<mask>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "answer_token": "<answer>"},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
