"""What is known of Fast-dVLM without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import CHATML_TURN, Checkpoint, FamilyFacts, ModelFamily, declare

CHECKPOINT = "Efficient-Large-Model/Fast_dVLM_3B"


@declare
class FastDVLMFamily(ModelFamily):
    """What ``FastDVLMAdapter`` declares."""

    family: ClassVar[str] = "fast_dvlm"
    caches: ClassVar[tuple[str, ...]] = ("prefix",)
    batches: ClassVar[bool] = False
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=(Checkpoint(CHECKPOINT, blocks=36),),
        transformers=">=4.57",
        turns=(CHATML_TURN,),
        rotary=(1_000_000.0,),
        remote_code=True,
        notes=(
            "its code comes with the checkpoint: load needs trust_remote_code=True; it could not "
            "be read, and nothing of it was run: the adapter follows the paper, the model card and "
            "code that others have published, and is tested on a double of what these say",
            "greedy decoding by the checkpoint's generate alone; its self-speculative decoding "
            "writes what the same weights write token by token, and is not run",
            "position p is predicted at p - 1, the first token of a block from what stands before "
            "it, read in the call that stores this: a step of its own",
            "blocks of 32 tokens, begun behind the prompt as in training: another length is given "
            "to load or wrap (block_length=…)",
        ),
    )
