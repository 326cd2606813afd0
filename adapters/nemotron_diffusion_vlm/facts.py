"""What is known of Nemotron-Labs-Diffusion-VLM without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import Checkpoint, FamilyFacts, ModelFamily, declare

CHECKPOINT = "nvidia/Nemotron-Labs-Diffusion-VLM-8B"


@declare
class NemotronDiffusionVLMFamily(ModelFamily):
    """What ``NemotronDiffusionVLMAdapter`` declares."""

    family: ClassVar[str] = "nemotron_diffusion_vlm"
    caches: ClassVar[tuple[str, ...]] = ("prefix",)
    batches: ClassVar[bool] = False
    several_images: ClassVar[bool] = False
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=(Checkpoint(CHECKPOINT, blocks=34),),
        transformers=">=5",
        rotary=(1_000_000.0,),
        remote_code=True,
        # a run that others published; the model card's own example could not be read whole
        decodings={"demo": {"gen_length": 512, "steps": 512, "threshold": 0.9}},
        notes=(
            "its code comes with the checkpoint: load needs trust_remote_code=True; it could not "
            "be read, and nothing of it was run: the adapter follows the model card and code that "
            "others have published, and is tested on a double of what these say",
            "it has a tokenizer and no processor: images are prepared here, as others describe the "
            "checkpoint's image_processing.py",
            "its diffusion mode alone is run; it also decodes token by token, and drafts by "
            "diffusion what it then verifies: twins of the same weights, not made here",
            "the first token of a block is the next token of what stands before it, read in the "
            "call that stores this: a step of its own",
            "steps are those of the whole answer; with a threshold a step commits all tokens that "
            "are as probable, one at least",
            "blocks of 32 tokens, the configuration's block_size: another length is given to load "
            "or wrap (block_length=…)",
        ),
    )
