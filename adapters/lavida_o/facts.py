"""What is known of LaViDa-O without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import LLADA_TURN, Checkpoint, FamilyFacts, ModelFamily, declare

CHECKPOINT = "jacklishufan/LaViDa-O-v1.0"
INSTALL = (
    "get adobe-research/LaVida-O under its own licence, install it with its requirements "
    "(torch 2.6.0, transformers 4.50.3, flash-attn 2.7.4.post1, deepspeed, diffusers), and set "
    "NOT_ALWASY_DO_2DPOOL=1 and DEBUG_FIX_PADDING=1"
)


@declare
class LavidaOFamily(ModelFamily):
    """What ``LavidaOAdapter`` declares."""

    family: ClassVar[str] = "lavida_o"
    batches: ClassVar[bool] = False
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=(Checkpoint(CHECKPOINT, blocks=32),),
        package="llava",
        install=INSTALL,
        turns=(LLADA_TURN,),
        rotary=(500_000.0,),
        # Demo.ipynb
        decodings={"demo": {"gen_length": 64, "block_length": 16, "step_ratio": 1.0}},
        notes=(
            "NOT_ALWASY_DO_2DPOOL=1 must be set before its package is imported, or it fails",
            "the base view is padded here; upstream stretches it unless DEBUG_FIX_PADDING=1",
            "upstream ignores steps (passed on here as step_per_block); nothing stops an answer",
            "with use_fast_dlm upstream commits by a rising bar of confidence, not by steps",
            "generation and editing of images, and grounding, are not supported",
        ),
    )
