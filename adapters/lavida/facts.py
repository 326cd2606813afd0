"""What is known of LaViDa without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import (
    CHATML_TURN,
    LLADA_TURN,
    Checkpoint,
    FamilyFacts,
    ModelFamily,
    declare,
)

CHECKPOINT = "jacklishufan/lavida-llada-v1.0-instruct"
INSTALL = (
    "git clone https://github.com/jacklishufan/LaViDa && pip install --no-deps -e LaViDa && "
    "pip install einops requests deepspeed"
)


#: steps of predict.py and of eval/run_coco.sh: one for two tokens, by a schedule
HALF = {"step_ratio": 0.5, "schedule": "shift"}


@declare
class LavidaFamily(ModelFamily):
    """What ``LavidaAdapter`` declares."""

    family: ClassVar[str] = "lavida"
    batches: ClassVar[bool] = False
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=(
            Checkpoint(CHECKPOINT, blocks=32),
            Checkpoint("jacklishufan/lavida-dream-v1.0-instruct", blocks=28),
            Checkpoint("jacklishufan/lavida-llada-1.0-lowres", blocks=32),
            Checkpoint("jacklishufan/lavida-llada-1.0-fim", blocks=32),
            Checkpoint("hbXNov/lavida-llada-reason", blocks=32),
        ),
        package="llava",
        install=INSTALL,
        transformers=">=4.46",
        turns=(LLADA_TURN, CHATML_TURN),  # of LLaDA-8B-Instruct and Dream-v0-Instruct-7B
        rotary=(500_000.0, 1_000_000.0),
        decodings={
            "demo": {**HALF, "gen_length": 64, "temperature": 0.1},
            "paper": {**HALF, "shift": 0.33},
        },
        notes=(
            "schedule='shift' has shift=3 by default and commits late; the authors evaluate with "
            "0.33",
            "LLaDA's own generate ignores steps (here they are passed on) and do_sample",
            "Dream's own generate samples (temperature 0.2); here the default is greedy",
            "a low-resolution checkpoint wants NOT_ALWASY_DO_2DPOOL=1 before its package is "
            "imported",
        ),
    )
