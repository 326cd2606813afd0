r"""Training of the autoregressive twin.

    torchrun --nproc-per-node 2 -m benchmarks.mini.twin train --out runs/twin --stages 4
    cp -r runs/twin/weights runs/before
    torchrun --nproc-per-node 2 -m benchmarks.mini.twin train --out runs/twin
    python -m benchmarks.mini.twin mean runs/before runs/twin/weights

The twin sees through the embedded model's own eyes: vision tower and projector are frozen, and only
the transformer is trained on, from the embedded model's weights, with a causal mask over image
tokens and words and the next word as target. Stages as in :mod:`benchmarks.mini.training`: coarse
image tokens first, then fine ones; the last two see more scenes whose objects are alike, which the
twin mixes up. Nothing is auxiliary, since what the auxiliary losses trained is frozen here. The
mean of the weights after the last two stages is what ships.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.mini.batches import PackedScenes, Pair, packed
from benchmarks.mini.trainer import EARLY, Stage, Trainer, grid_positions
from benchmarks.mini.training import run, write
from captum_dcam.mini.causal import MiniCausalConfig, MiniForCausalLM
from captum_dcam.mini.loading import load_mini
from captum_dcam.mini.modeling import MiniForMaskedDiffusion

TRAIN_SEED = 3_000_017  # the twin's own stream of training scenes; no other split uses it

STAGES = (
    Stage("coarse", 400, 2, 16, 1.0e-3, 0.8e-3, 0.0, 0.0),
    Stage("fine", 300, 1, 16, 0.6e-3, 0.0, 0.0, 0.0, 1.0, EARLY, 4),
    Stage("fine, again", 150, 1, 16, 0.4e-3, 0.0, 0.0, 0.0, 0.7, EARLY, 4),
    Stage("fine, alike", 700, 1, 16, 0.6e-3, 0.0, 0.0, 0.0, 0.7, EARLY, 4, 4),
    Stage("fine, alike again", 320, 1, 16, 0.4e-3, 0.0, 0.0, 0.0, 0.5, EARLY, 4, 4),
)


app = typer.Typer(add_completion=False)


class NextWords(PackedScenes):
    """Packed pairs whose answers end in one ``<eos>``; every position's target is the next word."""

    def _pack(self, pairs: list[Pair], rng: np.random.Generator) -> dict[str, np.ndarray]:
        columns: dict[str, list] = {k: [] for k in ("ids", "targets", "pair", "response", "offset")}
        for number, pair in enumerate(pairs):
            answer = [*(i for i in pair.canvas if i != self.maker.eos), self.maker.eos]
            ids = np.array(pair.prompt + answer)
            ahead = np.full(len(ids), -100)
            first = len(pair.prompt) - 1
            ahead[first:-1] = ids[first + 1 :]
            columns["ids"].append(ids)
            columns["targets"].append(ahead)
            columns["pair"].append(np.full(len(ids), number))
            columns["response"].append(np.arange(len(ids)) > first)
            columns["offset"].append(np.arange(len(ids)))
        return packed(columns, self.budget)


def causal_packed_mask(pair: Tensor, image_tokens: int) -> Tensor:
    """Attention of packed text (B, 1, T, N + T): the image, and what stands before in its pair."""
    length = pair.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=pair.device).tril()
    image = torch.ones(*pair.shape, image_tokens, dtype=torch.bool, device=pair.device)
    return torch.cat((image, (pair[:, :, None] == pair[:, None, :]) & before), dim=2)[:, None]


class TwinTrainer(Trainer):
    """The embedded model's trainer with frozen eyes and next-word targets, in float32."""

    half: ClassVar[bool] = False

    def __init__(self, seed: int, device: torch.device) -> None:
        model, _ = load_mini()
        model = model.train().requires_grad_(True)
        model.vision_tower.requires_grad_(False)
        model.projector.requires_grad_(False)
        super().__init__(seed, device, model)
        model.config._attn_implementation = "sdpa"  # in float32 it is the faster one
        trained = [p for p in model.parameters() if p.requires_grad]
        self.parameters = trained
        # every process takes the same step by the averaged gradients: there is nothing to share
        self.shares = []
        self.optimizers = (torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98)),)

    def loss(self, batch: dict, stage: Stage, aux_weight: float) -> tuple[Tensor, Tensor]:
        length = int((batch["pair"] >= 0).sum(1).max())  # what lies behind is padding
        batch = {k: v[:, :length] if v.ndim == 2 else v for k, v in batch.items()}
        pixels = batch["pixels"].permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            image = self.model.get_image_features(pixels, stage.pool)
        n = image.shape[1]
        positions = grid_positions(self.model.config.grid, stage.pool, self.device)
        embeds = torch.cat((image, self.model.embed_words(batch["ids"]).to(image.dtype)), dim=1)
        text = 576 + batch["offset"]
        causal = torch.ones(n, n, dtype=torch.bool, device=self.device).tril()
        out = self.model(
            inputs_embeds=embeds,
            segments=(n, text.shape[1]),
            segment_masks=(causal, causal_packed_mask(batch["pair"], n)),
            position_ids=torch.cat((positions.expand(len(text), -1), text), dim=1),
            logits_from=n,
        )
        scale = torch.where(batch["pair"] >= stage.descriptions, stage.question_weight, 1.0)
        text_loss = self.text_loss(out.logits, batch["targets"], scale)
        return text_loss, text_loss.detach()


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of checkpoint, log and weights.")],
    seed: Annotated[int, typer.Option(help="Seed of scenes.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that draw scenes; 0: none.")] = 0,
    stages: Annotated[int, typer.Option(min=1, help="Only the first so many.")] = len(STAGES),
) -> None:
    """Train the twin and write its weights to OUT/weights (safetensors, float16)."""
    chosen = STAGES[:stages]
    trainer = run(out, seed, workers, chosen, TwinTrainer, NextWords, TRAIN_SEED)
    if trainer.rank == 0:
        write(trainer, causal(trainer.model), chosen, seed, out)


@app.command()
def mean(before: Path, weights: Path) -> None:
    """Replace the WEIGHTS of a folder by their mean with those of another folder, BEFORE."""
    one, other = (load_mini(folder, kind=MiniForCausalLM)[0] for folder in (before, weights))
    halves = zip(one.parameters(), other.parameters(), strict=True)
    with torch.no_grad():
        for ours, theirs in halves:
            theirs.add_(ours).div_(2)
    other.half().save_pretrained(weights)


def causal(model: MiniForMaskedDiffusion) -> MiniForCausalLM:
    """The trained weights in the class that masks by itself; the eyes as they are packaged."""
    own = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version")
    shapes = {k: v for k, v in model.config.to_dict().items() if k not in own}
    twin = MiniForCausalLM(MiniCausalConfig(**shapes))
    twin.load_state_dict(model.state_dict())
    return twin


if __name__ == "__main__":
    app()
