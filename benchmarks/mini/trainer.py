"""The state of a training of the embedded model: model, optimisers, losses, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mini.batches import Masking, build_tokenizer, packed_mask
from captum_dcam.data.scenes import COLORS, SHAPES
from captum_dcam.errors import InputError
from captum_dcam.mini.configuration import MiniConfig
from captum_dcam.mini.modeling import MiniForMaskedDiffusion

EARLY = Masking(0.3, 0.25, (8,))
WARMUP = 150


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one resolution; ``lr`` and ``aux`` go linearly to their ends."""

    name: str
    steps: int
    pool: int
    batch: int
    lr: float
    lr_end: float
    aux: float
    aux_end: float
    question_weight: float = 1.0  # of a question's tokens against a description's
    masking: Masking = EARLY
    descriptions: int = 2  # of the pairs behind every image
    draws: int = 1  # every other scene is the most confusing of so many


class Auxiliary(nn.Module):
    """Heads that exist in training only: shape and colour of every patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, len(SHAPES) + 1)
        self.color = nn.Linear(width, len(COLORS) + 1)


class Trainer:
    """Model, optimisers and losses; the state that a checkpoint holds."""

    half: ClassVar[bool] = True  # compute in bfloat16 where that is safe

    def __init__(
        self, seed: int, device: torch.device, model: MiniForMaskedDiffusion | None = None
    ) -> None:
        torch.manual_seed(seed)
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.tokenizer = build_tokenizer()
        if model is None:
            model = MiniForMaskedDiffusion(MiniConfig(vocab_size=len(self.tokenizer)))
        config = model.config
        config._attn_implementation = "eager"
        self.model = model.to(device)
        self.aux = Auxiliary(config.hidden_size).to(device)
        words = self.tokenizer.convert_tokens_to_ids
        self.shape_words = torch.tensor([words(s) for s in SHAPES], device=device)
        self.color_words = torch.tensor([words(c) for c in COLORS], device=device)
        matrices: list[nn.Parameter] = []
        rest = list(self.aux.parameters())
        trained = ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        for name, p in trained:
            (matrices if p.ndim == 2 and "embed" not in name else rest).append(p)
        self.parameters = [*matrices, *rest]
        # Muon's orthogonalisation is shared out: each process updates its share of the matrices.
        self.shares = [matrices[r :: self.world] for r in range(self.world)]
        muon = torch.optim.Muon(
            self.shares[self.rank],
            lr=1e-3,
            weight_decay=0.02,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
        self.optimizers = (muon, adam)
        self.step = 0

    # -- losses -----------------------------------------------------------------------------

    def text_loss(self, logits: Tensor, targets: Tensor, scale: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the masked positions; the tail of ``<eos>`` counts a tenth."""
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        weight = torch.where(targets == self.tokenizer.eos_token_id, 0.1, 1.0)
        if scale is not None:
            weight = weight * scale
        weight = (weight * (targets != -100)).flatten()
        return (loss * weight).sum() / weight.sum().clamp_min(1)

    def auxiliary_loss(self, tower: Tensor, image: Tensor, batch: dict, pool: int) -> Tensor:
        shapes, colors = (
            batch[k][:, pool // 2 :: pool, pool // 2 :: pool].flatten()
            for k in ("shapes", "colors")
        )
        tower = tower.flatten(0, 1)
        loss = F.cross_entropy(self.aux.shape(tower).float(), shapes)
        loss = loss + F.cross_entropy(self.aux.color(tower).float(), colors)
        on = shapes > 0
        words = F.linear(
            F.rms_norm(image.flatten(0, 1)[on], image.shape[-1:]), self.model.embed_tokens.weight
        ).float()
        loss = loss + 0.5 * F.cross_entropy(words, self.shape_words[shapes[on] - 1])
        return loss + 0.5 * F.cross_entropy(words, self.color_words[colors[on] - 1])

    def packed_loss(self, image: Tensor, batch: dict, positions: Tensor, stage: Stage) -> Tensor:
        n = image.shape[1]
        embeds = torch.cat((image, self.model.embed_words(batch["ids"]).to(image.dtype)), dim=1)
        text = 576 + batch["offset"]
        where = torch.cat((positions.expand(len(text), -1), text), dim=1)
        mask = packed_mask(batch["pair"], batch["response"], n)
        out = self.model(
            inputs_embeds=embeds,
            segments=(n, text.shape[1]),
            segment_masks=(None, mask),
            position_ids=where,
            logits_from=n,
        )
        # the first pairs of a scene are descriptions
        scale = torch.where(batch["pair"] >= stage.descriptions, stage.question_weight, 1.0)
        return self.text_loss(out.logits, batch["targets"], scale)

    def deployed_loss(self, image: Tensor, batch: dict, positions: Tensor, stage: Stage) -> Tensor:
        """One pair per image: half of the images without a cache, half with the prefix cached."""
        losses = []
        half = image.shape[0] // 2
        choice = (0, 1, stage.descriptions)[self.step // 4 % 3]  # the last is a question
        for prefix, rows in ((True, slice(0, half)), (False, slice(half, None))):
            text = self._one_pair(batch, rows, choice)
            part, n = image[rows], image.shape[1]
            embeds = torch.cat((part, self.model.embed_words(text["ids"]).to(part.dtype)), dim=1)
            keys = torch.cat((positions.new_ones(len(part), n), text["valid"]), dim=1).bool()
            where = torch.cat((positions.expand(len(part), -1), text["where"]), dim=1)
            length, p = embeds.shape[1], n + text["prompt"]
            keys = keys[:, None, None]
            segments, masks = [length], [keys]
            if prefix:
                segments, masks = [p, length - p], [keys[..., :p], keys]
            out = self.model(
                inputs_embeds=embeds,
                segments=segments,
                segment_masks=masks,
                position_ids=where,
                logits_from=n,
            )
            losses.append(self.text_loss(out.logits, text["targets"]))
        return torch.stack(losses).mean()

    def _one_pair(self, batch: dict, rows: slice, choice: int) -> dict:
        """Pair ``choice`` of every row, prompts padded on the left, canvases on the right."""
        found = [(batch[k][rows], v) for k, v in (("ids", 0), ("targets", -100))]
        pair, response = batch["pair"][rows], batch["response"][rows]
        here = pair == choice
        prompts = (here & ~response).sum(1)
        canvases = (here & response).sum(1)
        p, c = int(prompts.max()), int(canvases.max())
        out = {"prompt": p, "valid": here.new_zeros(len(here), p + c, dtype=torch.float32)}
        names = ("ids", "targets")
        for name, (source, fill) in zip(names, found, strict=True):
            out[name] = source.new_full((len(here), p + c), fill)
            for i in range(len(here)):
                a, b = p - int(prompts[i]), p + int(canvases[i])
                out[name][i, a:b] = source[i][here[i]]
                out["valid"][i, a:b] = 1
        out["where"] = (576 + out["valid"].cumsum(1) - 1).clamp_min(576)
        return out

    def loss(self, batch: dict, stage: Stage, aux_weight: float) -> tuple[Tensor, Tensor]:
        """Weighted training loss, and the text loss alone."""
        pixels = batch["pixels"].permute(0, 3, 1, 2).float() / 127.5 - 1
        tower = self.model.vision_tower(pixels, stage.pool)
        image = self.model.projector(tower)
        positions = grid_positions(self.model.config.grid, stage.pool, self.device)
        if self.step % 4 == 3:
            text = self.deployed_loss(image, batch, positions, stage)
        else:
            text = self.packed_loss(image, batch, positions, stage)
        total = text
        if aux_weight > 0:
            total = text + aux_weight * self.auxiliary_loss(tower, image, batch, stage.pool)
        return total, text.detach()

    # -- one step, checkpoints -----------------------------------------------------------------

    def update(self, batch: dict, stage: Stage, done: float) -> float:
        """One optimiser step; ``done`` in [0, 1] is how far the stage is."""
        lr = stage.lr + (stage.lr_end - stage.lr) * done
        lr *= min(1.0, (self.step + 1) / WARMUP)
        aux = stage.aux + (stage.aux_end - stage.aux) * done
        batch = {k: v.to(self.device) for k, v in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            total, text = self.loss(batch, stage, aux)
        total.backward()
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self._share_matrices()
        for p in self.parameters:
            p.grad = None
        self.step += 1
        return float(text)

    def _average_gradients(self) -> None:
        if self.world == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.world
        parts = flat.split([g.numel() for g in grads])
        for p, part in zip(self.parameters, parts, strict=True):
            p.grad = part.view_as(p)

    @torch.no_grad()
    def _share_matrices(self) -> None:
        for rank, share in enumerate(self.shares if self.world > 1 else ()):
            flat = nn.utils.parameters_to_vector(share)
            dist.broadcast(flat, rank)
            nn.utils.vector_to_parameters(flat, share)

    def save(self, path: Path) -> None:
        """Write a checkpoint in one rename; all processes call it, the first one writes."""
        states: list = [None] * self.world
        mine = [o.state_dict() for o in self.optimizers]
        if self.world == 1:
            states = [mine]
        else:
            dist.gather_object(mine, states if self.rank == 0 else None)
        if self.rank != 0:
            return
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "aux": self.aux.state_dict(),
            "optimizers": states,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.aux.load_state_dict(state["aux"])
        if len(state["optimizers"]) != self.world:
            raise InputError(
                f"{path} was written by {len(state['optimizers'])} processes, this run has "
                f"{self.world}: resume with the same number"
            )
        for optimizer, saved in zip(self.optimizers, state["optimizers"][self.rank], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]


def grid_positions(grid: int, pool: int, device: torch.device) -> Tensor:
    """Sequence positions (1, N) of image tokens; pooled ones sit at the mean of their members."""
    axis = torch.arange(grid // pool, device=device) * pool + (pool - 1) / 2
    return (axis[:, None] * grid + axis[None, :]).reshape(1, -1)
