"""What is known of DiffusionVL without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import CHATML_TURN, Checkpoint, FamilyFacts, ModelFamily, declare

CHECKPOINT = "hustvl/DiffusionVL-Qwen2.5VL-3B"


@declare
class DiffusionVLFamily(ModelFamily):
    """What ``DiffusionVLAdapter`` declares."""

    family: ClassVar[str] = "diffusion_vl"
    caches: ClassVar[tuple[str, ...]] = ("prefix",)
    batches: ClassVar[bool] = False
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=(
            Checkpoint(CHECKPOINT, blocks=36),
            Checkpoint("hustvl/DiffusionVL-Qwen2.5VL-7B", blocks=28),
        ),
        transformers=">=4.52",
        turns=(CHATML_TURN,),
        rotary=(1_000_000.0,),
        remote_code=True,
        # docs/INFERENCE.md
        decodings={
            "demo": {
                "gen_length": 128,
                "steps": 8,
                "temperature": 0.0,
                "remasking_strategy": "low_confidence_static",
            }
        },
        notes=(
            "its code comes with the checkpoint: load needs trust_remote_code=True; the "
            "repository's code (package llava) was run, the checkpoints' is known from others",
            "the package llava needs transformers 4 (4.55.0 was run): it imports a function of "
            "Qwen2.5-VL that transformers 5 does not have",
            "steps are those of a block of 4 tokens (8 in some checkpoints): more than its tokens "
            "are not taken",
            "the prompt's last tokens, fewer than a block, are decoded with the answer's first: an "
            "image that ends among them is in no call, and is refused",
            "gen_length is rounded up to whole blocks; the block of <|im_end|> ends an answer",
            "a block whose masks are not filled when its steps run out is not stored, and upstream "
            "fails at the next one",
        ),
    )
