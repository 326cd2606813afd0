"""What is known of LLaDA-V without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import LLADA_TURN, Checkpoint, FamilyFacts, ModelFamily, declare

CHECKPOINT = "GSAI-ML/LLaDA-V"
INSTALL = (
    "git clone https://github.com/ML-GSAI/LLaDA-V && pip install requests einops, and put its "
    "folder LLaDA-V/train on PYTHONPATH (the package is called llava)"
)

VIDEO_INSTALL = (
    "git clone https://github.com/ziHoHe/VidLaDA && pip install requests einops, and put its "
    "folder VidLaDA/train on PYTHONPATH in place of LLaDA-V's (the package is called llava too)"
)

WHOLE = {"gen_length": 128, "steps": 128, "block_length": 128}


@declare
class LladaVFamily(ModelFamily):
    """What ``LladaVAdapter`` declares."""

    family: ClassVar[str] = "llada_v"
    caches: ClassVar[tuple[str, ...]] = ("none",)
    batches: ClassVar[bool] = False
    takes_video: ClassVar[bool] = True  # VidLaDA
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        checkpoints=(
            Checkpoint(CHECKPOINT, blocks=32),
            Checkpoint("jiyatai/ReDiff", blocks=32),
            Checkpoint("ziHoHe/VidLaDA-8B", blocks=32),
        ),
        package="llava",
        install=INSTALL,
        turns=(LLADA_TURN,),
        rotary=(500_000.0,),
        # generate_demo.py, but for its dLLM-Cache; ReDiff's (and its eval/inference.sh, which also
        # has steps=32)
        # VidLaDA's eval_video.sh
        decodings={
            "demo": WHOLE,
            "rediff": {**WHOLE, "revise": True},
            "vidlada": {"gen_length": 2, "steps": 2, "block_length": 2},
        },
        notes=(
            "max_new_tokens is ignored: gen_length counts",
            "upstream's function stops at nothing unless stopping_criteria says so; here the "
            "default is the demo's <|eot_id|>",
            "EOS, BOS and header ids cannot be generated",
            "on CUDA decoding runs under autocast in float16, whatever the weights' type",
            "dLLM-Cache cannot be explained: switch it off; Fast-dLLM can stay",
            "ReDiff is these classes with other weights and a decoder that edits: install "
            'jiyt17/ReDiff in place of LLaDA-V and give decoding="rediff"; a token that its last '
            "step still edited has no commit: score='final' reads it",
            "VidLaDA is a class of its own and takes videos: install ziHoHe/VidLaDA in place of "
            "LLaDA-V; a video needs the configuration of its evaluation, which loading by name "
            "sets; once a stop is found, it can write tokens of its block anew",
        ),
    )
