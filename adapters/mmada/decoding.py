r"""What MMaDA's adapter computes: the picture as the model sees it, and one step of decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.adapters.common import compat as _compat
from captum_dcam.adapters.common.recording import CanvasLog
from captum_dcam.adapters.common.visuals import edges
from captum_dcam.errors import InputError, InputTypeError, MethodError, WeightsError
from captum_dcam.model.layout import Grid

#: ids that upstream reserves in LLaDA's vocabulary
MASK, EOS, TURN_END = 126336, 126081, 126348
HEADER, HEADER_END = 126346, 126347
UNDERSTAND, IMAGE_START, IMAGE_END = 126089, 126084, 126085
#: pixels a side of the square that one code stands for
STRIDE = 16
#: tokens before the first image token
BEFORE = 2
FITS = ("crop", "squash")
REMASKING = ("low_confidence", "random")
#: a picture longer than this is cropped to less than a hundredth of itself
LONGEST = 100


@dataclass(frozen=True)
class Settings:
    """Settings of ``mmu_generate`` that matter; see :meth:`MmadaAdapter.generate`."""

    max_new_tokens: int = 128
    block_length: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"


#: arguments of ``mmu_generate`` that are not taken, and why
REFUSED = {
    "top_k": "MMaDA accepts and ignores it",
    "eot_token": "MMaDA accepts and ignores it: an answer is always as long as its canvas",
    "attention_mask": "a batch here has no padding, so there is nothing to mask",
}


def checked(given: dict[str, Any], generator: torch.Generator | None) -> dict[str, Any]:
    """Arguments for ``mmu_generate``; raises before any work on what cannot work."""
    given = dict(given)
    if "gen_length" in given:
        if "max_new_tokens" in given:
            raise InputError("gen_length and max_new_tokens mean the same: give one of them")
        given["max_new_tokens"] = given.pop("gen_length")
    known = list(Settings.__dataclass_fields__)
    for name in given:
        if name not in known:
            why = f": {REFUSED[name]}" if name in REFUSED else ""
            raise InputTypeError(f"setting {name!r} is not taken{why}. Known: {', '.join(known)}")
    out = asdict(Settings(**given))
    length = out["max_new_tokens"]
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise InputError(f"max_new_tokens is {length!r}: the canvas needs at least one token")
    block = out["block_length"] = length if out["block_length"] is None else out["block_length"]
    if block < 1 or length % block:
        raise InputError(f"max_new_tokens {length} is not a multiple of block_length {block}")
    blocks = length // block
    steps = out["steps"] = length if out["steps"] is None else out["steps"]
    if steps < blocks or steps % blocks:
        raise InputError(
            f"steps is {steps}: expected a positive multiple of the {blocks} blocks "
            f"(max_new_tokens {length} / block_length {block})"
        )
    if out["remasking"] not in REMASKING:
        raise InputError(f"remasking is {out['remasking']!r}: expected one of {REMASKING}")
    for name in ("temperature", "cfg_scale"):
        if not 0 <= out[name] < float("inf"):
            raise InputError(f"{name} is {out[name]!r}: expected a finite number, 0 or more")
    if (out["temperature"] > 0 or out["remasking"] == "random") and generator is None:
        raise InputError("sampling needs a generator: pass torch.Generator().manual_seed(0)")
    return out


def loaded(
    source: str,
    *,
    vq: str = "showlab/magvitv2",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, tuple[Any, Any]]:
    r"""Model, tokenizer and VQ model of a checkpoint, through the upstream package.

    Args:
        source (str): folder or hub name.
        vq (str, optional): folder or hub name of the VQ model; it stays in float32, as upstream has
            it. Default: ``"showlab/magvitv2"``
        device, dtype, device_map, revision: of the language model.
        trust_remote_code (bool, optional): for the tokenizer; the model's code is the upstream
            package's. Default: False

    Raises:
        ImportError: the upstream package is not importable; gives the install lines.
        WeightsError: files are missing or damaged.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    upstream = _compat.mmada_package()
    hub = {} if revision is None else {"revision": revision}
    options = {} if device_map is None else {"device_map": device_map}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, **hub
        )
        model = upstream.MMadaModelLM.from_pretrained(source, dtype=dtype, **hub, **options)
        vq_model = upstream.MAGVITv2.from_pretrained(vq)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{source} cannot be loaded: {error}") from error
    if device is not None and device_map is None:
        model = model.to(device)
    vq_model = vq_model.to(next(model.parameters()).device).eval().requires_grad_(False)
    return model.eval(), (tokenizer, vq_model)


def fitted(picture: Image.Image, resolution: int, fit: str) -> tuple[Tensor, Grid]:
    r"""A picture as the VQ encoder wants it, and where its tokens lie.

    ``crop`` scales the shorter side to ``resolution`` and takes the middle square, so that the ends
    of a long picture are in no box; ``squash`` scales both sides.

    Args:
        picture (Image): RGB.
        resolution (int): side of the square in pixels.
        fit (str): ``crop`` or ``squash``.

    Returns:
        tuple: pixels (3, R, R) float32 in [-1, 1]; the grid, row-major behind the prefix.
    """
    width, height = picture.size
    wide, high = resolution, resolution
    if fit == "crop" and width > height:
        wide = int(resolution * width / height)
    elif fit == "crop":
        high = int(resolution * height / width)
    left, top = round((wide - resolution) / 2), round((high - resolution) / 2)
    square = picture.resize((wide, high), Image.Resampling.BICUBIC).crop(
        (left, top, left + resolution, top + resolution)
    )
    pixels = torch.from_numpy(np.array(square, dtype=np.uint8)).permute(2, 0, 1).float() / 255
    side = resolution // STRIDE
    x_scale, y_scale = width / wide, height / high
    grid = Grid(
        torch.arange(BEFORE, BEFORE + side * side).view(side, side),
        edges(left * x_scale, (left + resolution) * x_scale, side),
        edges(top * y_scale, (top + resolution) * y_scale, side),
        (height, width),
    )
    return (pixels - 0.5) / 0.5, grid


class _Codes(torch.autograd.Function):
    """Embeddings of codes that were read off pixels: whoever asks for the pixels' gradient is told
    that there is none. Gradients with respect to anything above never come here."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, embeddings: Tensor) -> Tensor:
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> Any:
        raise MethodError(
            "no gradient reaches the pixels of MMaDA: its VQ encoder turns the picture into "
            "integer codes, and a logit does not change with a small change of a pixel; use a "
            "method that reads the tapped block (diffusion_cam, layer_grad_cam, attention, …), or "
            "one that perturbs pixels without gradients (occlusion, kernel_shap, …)"
        )


@torch.no_grad()
def codes_of(vq_model: Any, pixels: Tensor) -> Tensor:
    """VQ codes (B, n) of pixels (B, 3, R, R), computed where and as the VQ model is."""
    like = next(vq_model.parameters())
    codes = vq_model.get_code(pixels.to(like.device, like.dtype))
    side = pixels.shape[-1] // STRIDE
    if codes.shape != (len(pixels), side * side):
        raise InputError(
            f"the VQ model gave codes {tuple(codes.shape)} for pixels {tuple(pixels.shape)}: "
            f"expected ({len(pixels)}, {side * side}), one for every {STRIDE} × {STRIDE} pixels; "
            "give the MAGVITv2 model that MMaDA is trained with"
        )
    return codes


def prefix_ids(codes: Tensor, text: Tensor, offset: int) -> Tensor:
    """Ids (B, P) of the prompt: ``<|mmu|> <|soi|>``, the codes behind the text vocabulary of
    ``offset`` ids, ``<|eoi|>``, the text (B, K)."""
    marks = text.new_tensor([UNDERSTAND, IMAGE_START, IMAGE_END]).expand(len(text), 3)
    return torch.cat((marks[:, :2], codes.to(text) + offset, marks[:, 2:], text), dim=1)


def without_gradient(pixels: Tensor, embeddings: Tensor) -> Tensor:
    """The embeddings, tied to pixels that want a gradient so that the request is answered."""
    return _Codes.apply(pixels, embeddings) if pixels.requires_grad else embeddings


def step_logits(model: Any, prefix: Tensor, canvas: Tensor, scale: Tensor | None) -> Tensor:
    r"""Logits (R, T, V) of one step: what ``mmu_generate`` computes before it chooses.

    Guided, R rows follow in which the whole prompt, picture included, is masked.

    Args:
        model (nn.Module): the language model.
        prefix (Tensor): (R, P, D) embeddings of the prompts.
        canvas (Tensor): (R, T) ids.
        scale (Tensor, optional): (R,) guidance scale.
    """
    words = model.get_input_embeddings()
    answer = words(canvas)
    embeds = torch.cat((prefix.to(answer.dtype), answer), dim=1)
    if scale is not None:
        mask = words(canvas.new_tensor([MASK])).expand_as(prefix)
        embeds = torch.cat((embeds, torch.cat((mask, answer), dim=1)))
    # no attention_mask: one with zeros would make the model causal
    out = model(inputs_embeds=embeds, use_cache=False, return_dict=True)
    logits = out.logits[:, prefix.shape[1] :]
    return logits if scale is None else guided(logits, scale[:, None, None])


def guided(logits: Tensor, scale: Any) -> Tensor:
    """Classifier-free guidance over rows [conditional; unconditional]."""
    conditional, blind = logits.chunk(2)
    return blind + (scale + 1) * (conditional - blind)


@contextmanager
def logged(model: nn.Module, prefix: int, scale: float) -> Iterator[CanvasLog]:
    """Record ``mmu_generate``, which keeps no history, from the model's inputs and outputs."""
    log = CanvasLog(MASK)

    def before(_module: nn.Module, args: Sequence[Tensor]) -> None:
        ids = args[0].chunk(2)[0] if scale > 0 else args[0]
        log.see(ids[:, prefix:])

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        logits = output.logits[:, prefix:]
        log.read(guided(logits, scale) if scale > 0 else logits)

    handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()
