"""What is known of MinerU-Diffusion without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import CHATML_TURN, Checkpoint, FamilyFacts, ModelFamily, declare

CHECKPOINT = "opendatalab/MinerU-Diffusion-V1-0320-2.5B"


@declare
class MinerUDiffusionFamily(ModelFamily):
    """What ``MinerUDiffusionAdapter`` declares."""

    family: ClassVar[str] = "mineru_diffusion"
    caches: ClassVar[tuple[str, ...]] = ("prefix",)
    batches: ClassVar[bool] = False
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=(Checkpoint(CHECKPOINT, blocks=28),),
        transformers=">=4.52,!=4.54.*,!=4.55.*,!=4.56.*",
        turns=(CHATML_TURN,),
        rotary=(1_000_000.0,),
        remote_code=True,
        # engines/hf/runner.py
        decodings={
            "demo": {
                "gen_length": 1024,
                "denoising_steps": 32,
                "temperature": 1.0,
                "dynamic_threshold": 0.95,
            }
        },
        notes=(
            "its code comes with the checkpoint: load needs trust_remote_code=True",
            "there is no greedy mode: every generation needs a generator; top_k=1 makes every "
            "token sure, so that a block is written in one step",
            "blocks of 32 tokens, as the authors' runner has them: another length is given to load "
            "or wrap (block_length=…), since the prompt's mask depends on it",
            "with fewer denoising_steps than a block has tokens, a step may write over visible "
            "tokens of its block: a token commits at its last change",
            "gen_length is rounded up to whole blocks; the block of <|im_end|> or <|endoftext|> "
            "ends an answer",
            "transformers 4.54 to 4.56 have caches that its code cannot read",
        ),
    )
