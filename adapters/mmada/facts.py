"""What is known of MMaDA without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import Checkpoint, FamilyFacts, ModelFamily, declare

CHECKPOINT = "Gen-Verse/MMaDA-8B-MixCoT"
INSTALL = (
    "git clone https://github.com/Gen-Verse/MMaDA && pip install diffusers einops jaxtyping "
    "omegaconf pandas requests typeguard, and put the folder MMaDA on PYTHONPATH (its package is "
    "called models)"
)


@declare
class MmadaFamily(ModelFamily):
    """What ``MmadaAdapter`` declares."""

    family: ClassVar[str] = "mmada"
    caches: ClassVar[tuple[str, ...]] = ("none",)
    several_images: ClassVar[bool] = False
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=(
            Checkpoint("Gen-Verse/MMaDA-8B-Base", blocks=32),
            Checkpoint(CHECKPOINT, blocks=32),
        ),
        package="models",
        install=INSTALL,
        transformers=">=4.46",
        turns=(
            "<|start_header_id|>user<|end_header_id|>\n{}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n",
        ),
        rotary=(500_000.0,),
        # inference_mmu.py with configs/mmada_demo.yaml
        decodings={"demo": {"max_new_tokens": 512, "steps": 256, "block_length": 128}},
        notes=(
            "no gradient reaches pixels: the image is integer codes; methods that ask for it get "
            "an error, those on the tapped block work",
            "nothing ends an answer: eot_token is accepted and ignored upstream",
            "upstream's steps are 128 whatever max_new_tokens; here a step per token",
            "upstream squashes images whose file name holds ai2d, clevr, docvqa, geo or llava, "
            'and crops all others; here fit="crop" or "squash" says so',
            "an attention_mask with a zero would make the model causal: none is passed, so that "
            "prompts of one batch need as many tokens",
        ),
    )
