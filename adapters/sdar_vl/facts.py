"""What is known of SDAR-VL without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import Checkpoint, FamilyFacts, ModelFamily, declare

CHECKPOINT = "JetLM/SDAR-VL-Instruct-4B"


@declare
class SDARVLFamily(ModelFamily):
    """What ``SDARVLAdapter`` declares."""

    family: ClassVar[str] = "sdar_vl"
    caches: ClassVar[tuple[str, ...]] = ("prefix",)
    batches: ClassVar[bool] = False
    several_images: ClassVar[bool] = False
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=tuple(
            Checkpoint(f"JetLM/SDAR-VL-{kind}-{size}", blocks=36)
            for kind in ("Instruct", "Think")
            for size in ("4B", "8B")
        ),
        transformers=">=4.52",
        remote_code=True,
        # generate.py, whose blocks have 4 tokens
        decodings={
            "demo": {
                "gen_length": 2048,
                "denoising_steps": 4,
                "temperature": 1.0,
                "remasking_strategy": "low_confidence_static",
            }
        },
        notes=(
            "its code comes with the checkpoint, and could not be read: the authors' generate.py "
            "was run on a double; name the family, load(…, family='sdar_vl', "
            "trust_remote_code=True)",
            "the decoding loop is a script of its authors, not a method of the model: it is "
            "written anew here, and its answers are the script's",
            "temperature 0 is the script's top_k=1: greedy, sure by the softmax",
            "blocks of 8 tokens, the script's default (its example has 4): another length is given "
            "to load or wrap (block_length=…)",
            "the prompt's last tokens, fewer than a block, are decoded with the answer's first: an "
            "image that ends among them is in no call, and is refused",
            "with fewer denoising_steps than a block has tokens, a step may write over visible "
            "tokens; where these could be the prompt's, it is refused",
        ),
    )
