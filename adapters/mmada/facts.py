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
#: the class of Lumina-DiMOO's model, its checkpoint, and what installs its code
LUMINA, ROWS_CHECKPOINT = "LLaDAForMultiModalGeneration", "Alpha-VLLM/Lumina-DiMOO"
ROWS_INSTALL = (
    "git clone https://github.com/Alpha-VLLM/Lumina-DiMOO && pip install diffusers, and put the "
    "folder Lumina-DiMOO on PYTHONPATH (its package is called model)"
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
            Checkpoint(ROWS_CHECKPOINT, blocks=32),
        ),
        package="models",
        install=INSTALL,
        transformers=">=4.46",
        turns=(
            "<|start_header_id|>user<|end_header_id|>\n{}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n",
            "<user>{}</user><answer>",
        ),
        rotary=(500_000.0,),
        # inference_mmu.py with configs/mmada_demo.yaml; Lumina-DiMOO: the command of its README,
        # and what its report says of image understanding (blocks of 256, 128 steps), whose length
        # is that of its inference_mmu.py
        decodings={
            "demo": {"max_new_tokens": 512, "steps": 256, "block_length": 128},
            "lumina": {"max_new_tokens": 128, "steps": 128, "block_length": 32},
            "lumina-paper": {"max_new_tokens": 1024, "steps": 128, "block_length": 256},
        },
        notes=(
            "no gradient reaches pixels: the image is integer codes; methods that ask for it get "
            "an error, those on the tapped block work",
            "nothing ends an answer: eot_token is accepted and ignored upstream",
            "upstream's steps are 128 whatever max_new_tokens; here a step per token",
            "upstream squashes images whose file name holds ai2d, clevr, docvqa, geo or llava, "
            'and crops all others; here fit="crop" or "squash" says so',
            "an attention_mask with a zero would make the model causal: none is passed, so that "
            "prompts of one batch need as many tokens",
            "Lumina-DiMOO is this model with other packing: install Alpha-VLLM/Lumina-DiMOO in "
            "place of MMaDA, give diffusers' VQModel, and decoding='lumina'; its script fails "
            "behind a block that holds EOS, and draws where an image is cropped: here the answer "
            "ends there, and the middle is taken",
        ),
    )
