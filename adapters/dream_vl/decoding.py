r"""What Dream-VL's adapter computes: pictures, settings, and one step of decoding."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.autoregressive.qwen import Qwen
from captum_dcam.adapters.common import compat as _compat
from captum_dcam.adapters.common.recording import CanvasLog
from captum_dcam.adapters.common.visuals import Seen, Visual
from captum_dcam.errors import InputError, InputTypeError

ALGORITHMS = ("maskgit_plus", "topk_margin", "entropy", "origin")


class DreamVL(Qwen):
    """Qwen2-VL's pictures and format, without vision markers around them: so image tokens have
    text positions (mRoPE is inactive), and several pictures stand in one run."""

    model_types: ClassVar[tuple[str, ...]] = ("dream-vl",)
    placeholders: ClassVar[tuple[str, str]] = ("<|image_pad|>", "<|video_pad|>")

    def see(self, visual: Visual) -> Seen:
        if not visual.video:
            return super().see(visual)
        step = self.config.vision_config.temporal_patch_size
        frames = [*visual.frames, *[visual.frames[-1]] * (-len(visual.frames) % step)]
        out = self.image_processor(images=None, videos=[frames], return_tensors="pt")
        pixels, grid = out["pixel_values_videos"], out["video_grid_thw"]
        return self._seen(visual, pixels, grid, "video_grid_thw")

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        out = super().inputs(pixels, input_ids, extras)
        del out["mm_token_type_ids"]  # Dream-VL counts positions by the ids
        return out


@dataclass(frozen=True)
class Settings:
    """Settings of ``diffusion_generate`` that matter; see :meth:`DreamVLAdapter.generate`."""

    max_new_tokens: int = 128
    steps: int | None = None
    alg: str = "maskgit_plus"
    alg_temp: float | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3
    eos_penalty: float = 0.0


def checked(given: dict[str, Any], generator: torch.Generator | None) -> dict[str, Any]:
    """Settings for ``diffusion_generate``; raises before any work on what cannot work."""
    given = dict(given)
    if given.pop("use_cache", False):
        raise InputError(
            "use_cache is True: Dream-VL's prompt cache fails at the second step (transformers 4: "
            "a shape error, 5: DynamicCache), so every step runs the whole sequence; leave it out"
        )
    if "gen_length" in given:
        if "max_new_tokens" in given:
            raise InputError("gen_length and max_new_tokens mean the same: give one of them")
        given["max_new_tokens"] = given.pop("gen_length")
    known = list(Settings.__dataclass_fields__)
    for name in given:
        if name not in known:
            raise InputTypeError(f"setting {name!r} is not taken. Known: {', '.join(known)}")
    out = asdict(Settings(**given))
    out["steps"] = out["max_new_tokens"] if out["steps"] is None else out["steps"]
    for name in ("max_new_tokens", "steps"):
        if isinstance(out[name], bool) or not isinstance(out[name], int) or out[name] < 1:
            raise InputError(f"{name} is {out[name]!r}: expected a whole number of at least 1")
    if out["alg"] not in ALGORITHMS:
        raise InputError(f"alg is {out['alg']!r}: expected one of {ALGORITHMS}")
    for name in ("temperature", "alg_temp"):
        if out[name] is not None and not 0 <= out[name] < float("inf"):
            raise InputError(f"{name} is {out[name]!r}: expected a finite number, 0 or more")
    if not 0 < out["eps"] < 1:
        raise InputError(f"eps is {out['eps']!r}: expected a time between 0 and 1")
    if out["top_k"] is not None and out["top_k"] < 1:
        raise InputError(f"top_k is {out['top_k']!r}: expected at least 1, or None")
    if out["top_p"] is not None and not 0 < out["top_p"] <= 1:
        raise InputError(f"top_p is {out['top_p']!r}: expected a share in (0, 1], or None")
    drawn = out["alg"] == "origin" or out["temperature"] > 0 or (out["alg_temp"] or 0) > 0
    if drawn and generator is None:
        raise InputError(
            f"sampling (alg {out['alg']!r}, temperature {out['temperature']}, alg_temp "
            f"{out['alg_temp']}) needs a generator: pass torch.Generator().manual_seed(0)"
        )
    return out


def generation_config(model: Any, settings: dict[str, Any]) -> Any:
    r"""Upstream's configuration object with these settings and nothing inherited.

    Without one upstream derives it from the model's configuration: in transformers 4 that gives
    temperature 1.0 and top_k 50, in transformers 5 it fails.
    """
    config = model.config
    name = "DreamVLGenerationMixin"
    mixin = next(c for c in type(model).__mro__ if c.__name__ == name)
    made = sys.modules[mixin.__module__].DreamVLGenerationConfig(
        **settings,
        use_cache=False,
        return_dict_in_generate=True,
        mask_token_id=config.mask_token_id,
        pad_token_id=config.pad_token_id,
    )
    # transformers 5 calls it with arguments that upstream's empty check does not take
    made.validate = _no_check
    return made


def _no_check(*_args: Any, **_kwargs: Any) -> None:
    """Settings are checked by :func:`checked`."""


@dataclass(frozen=True)
class Prompt:
    r"""Embedded prompts of R rows.

    Args:
        embeds (Tensor): (R, P, D), pictures in their places.
        ids (Tensor): (R, P), from which positions are counted.
        mask (Tensor): (R, P) int64, 0 at padding.
        grids (tuple of Tensor): (R, n, 3) of pictures, (R, m, 3) of videos: patches along time,
            height and width.
    """

    embeds: Tensor
    ids: Tensor
    mask: Tensor
    grids: tuple[Tensor, Tensor]

    def rows(self, index: Tensor) -> Prompt:
        """Rows ``index`` (R,)."""
        grids = (self.grids[0][index], self.grids[1][index])
        return Prompt(self.embeds[index], self.ids[index], self.mask[index], grids)


def embedded(
    model: Any, ids: Tensor, mask: Tensor, extras: dict[str, Tensor], parts: dict
) -> Prompt:
    r"""The prompt of one example, as the model's forward embeds it.

    Args:
        model (nn.Module): Dream-VL.
        ids, mask (Tensor): (1, P).
        extras (dict): ``image_grid_thw`` and ``video_grid_thw``, (1, n, 3) each.
        parts (dict): from :meth:`DreamVL.inputs`.
    """
    embeds = model.get_input_embeddings()(ids)
    for value, grid, token, features in (
        ("pixel_values", "image_grid_thw", model.config.image_token_id, model.get_image_features),
        (
            "pixel_values_videos",
            "video_grid_thw",
            model.config.video_token_id,
            model.get_video_features,
        ),
    ):
        if value in parts:
            seen = torch.cat(features(parts[value], parts[grid])).to(embeds.dtype)
            where = (ids == token)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(where, model.projector(seen))
    return Prompt(embeds, ids, mask, (extras["image_grid_thw"], extras["video_grid_thw"]))


def joined(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts of several examples as rows of one."""
    if len(prompts) == 1:
        return prompts[0]
    return replace(
        prompts[0],
        embeds=torch.cat([p.embeds for p in prompts]),
        ids=torch.cat([p.ids for p in prompts]),
        mask=torch.cat([p.mask for p in prompts]),
        grids=(
            torch.cat([p.grids[0] for p in prompts]),
            torch.cat([p.grids[1] for p in prompts]),
        ),
    )


def step_logits(model: Any, prompt: Prompt, canvas: Tensor) -> Tensor:
    r"""Logits (R, T, V) of canvases (R, T); row t predicts position t.

    The model predicts position p from p - 1, so the rows begin at the prompt's last token.
    """
    answer = model.get_input_embeddings()(canvas)
    ids = torch.cat((prompt.ids, canvas), dim=1)
    mask = torch.cat((prompt.mask, torch.ones_like(canvas)), dim=1)
    grids = [g.flatten(0, 1) if g.shape[1] else None for g in prompt.grids]
    positions, _ = model.get_rope_index(ids, *grids, mask)
    with expanded_mask(model):
        logits = model(
            inputs_embeds=torch.cat((prompt.embeds.to(answer.dtype), answer), dim=1),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            return_dict=True,
        ).logits
    first = prompt.ids.shape[1] - 1
    return logits[:, first : first + canvas.shape[1]]


@contextmanager
def expanded_mask(model: Any) -> Iterator[None]:
    r"""The mask (B, N) that upstream insists on reaches its attention as (B, 1, N, N).

    Upstream expands it on CUDA only, and only for fused attention. Padding sees itself alone, so
    that no row of attention is empty; nobody sees padding. Flash attention takes it as it is.
    """
    kind = type(model.model.layers[0].self_attn).__name__

    def expand(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2 or "Flash" in kind:
            return None
        valid = mask.bool()
        seen = valid[:, None, :, None] & valid[:, None, None, :]
        seen = seen | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        if "Sdpa" not in kind:  # written out: the mask is added to the scores
            dtype = kwargs["inputs_embeds"].dtype
            seen = torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(
                ~seen, torch.finfo(dtype).min
            )
        return args, {**kwargs, "attention_mask": seen}

    handle = model.model.register_forward_pre_hook(expand, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def generated(model: Any, ids: Tensor, config: Any, inputs: dict[str, Any]) -> CanvasLog:
    """Run upstream's ``diffusion_generate`` on one example (1, P), and record it by its own hooks:
    canvas and shifted logits before every choice."""
    prefix = ids.shape[1]
    log = CanvasLog(config.mask_token_id)

    def note(_step: int, x: Tensor, logits: Tensor) -> Tensor:
        log.see(x[:, prefix:])
        log.read(logits[:, prefix:])
        return logits

    with _compat.dream_vl_callable(model), expanded_mask(model):
        result = model.diffusion_generate(
            ids, generation_config=config, generation_logits_hook_func=note, **inputs
        )
    log.finish(result.sequences[:, prefix:])
    return log
