r"""LLaDA-V: the whole sequence at every step, pictures as a base view and a mosaic of tiles.

Upstream: ``ML-GSAI/LLaDA-V`` (package ``llava`` under ``train/``), checkpoint ``GSAI-ML/LLaDA-V``.
One example at a time; every call is feasible. What surprises in upstream's defaults:
``max_new_tokens`` is ignored (``gen_length`` counts), nothing stops the answer unless
``stopping_criteria`` says so, EOS cannot be generated, and on CUDA decoding runs in float16
whatever the weights' type. Of its caches Fast-dLLM can stay registered (its part-length steps are
infeasible, as the table of calls shows, and are explained through its cache); dLLM-Cache cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.adapters.common import anyres as _anyres
from captum_dcam.adapters.common import llava
from captum_dcam.adapters.common.anyres import Tiling
from captum_dcam.adapters.common.recording import seeded
from captum_dcam.adapters.common.text import Words, special_ids
from captum_dcam.adapters.llada_v import decoding
from captum_dcam.adapters.llada_v.loading import CHECKPOINT, INSTALL, loaded
from captum_dcam.errors import InputError, InputTypeError
from captum_dcam.model.adapter import Adapter, Checkpoint, Facts, Request, register
from captum_dcam.model.layout import Layout
from captum_dcam.model.trajectory import Trajectory


@register
class LladaVAdapter(Adapter):
    r"""Adapter of ``LlavaLLaDAModelLM``.

    Args:
        model (nn.Module): from upstream's ``load_pretrained_model``.
        processor (tuple): ``(tokenizer, image_processor)``, as that function returns them.
        regime (str, optional): ``full``, the family's only one.
        system (str, optional): system prompt; None for the template's own. Default: that of the
            authors' conversation template ``llava_llada``
    """

    family: ClassVar[str] = "llada_v"
    model_types: ClassVar[tuple[str, ...]] = ("llava_llada",)
    architectures: ClassVar[tuple[str, ...]] = ("LlavaLLaDAModelLM",)
    regimes: ClassVar[tuple[str, ...]] = ("full",)
    batches: ClassVar[bool] = False
    facts: ClassVar[Facts] = Facts(
        checkpoints=(Checkpoint(CHECKPOINT, blocks=32),),
        package="llava",
        install=INSTALL,
        transformers=">=4.40",
        notes=(
            "max_new_tokens is ignored: gen_length counts",
            "upstream's function stops at nothing unless stopping_criteria says so; here the "
            "default is the demo's <|eot_id|>",
            "EOS, BOS and header ids cannot be generated",
            "on CUDA decoding runs under autocast in float16, whatever the weights' type",
            "dLLM-Cache cannot be explained: switch it off; Fast-dLLM can stay",
        ),
    )
    model: Any

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        regime: str | None = None,
        *,
        system: str | None = llava.SYSTEM,
    ) -> None:
        super().__init__(model, processor, regime)
        if not self.owns(model):
            raise InputTypeError(
                f"the model is a {type(model).__name__}: expected LlavaLLaDAModelLM, as upstream's "
                "load_pretrained_model(…, 'llava_llada') returns it"
            )
        self.tokenizer, self.image_processor = llava.parts_of(processor)
        self.system = system
        self.tiling = tiling_of(self.model, self.image_processor)
        self._words = Words(self.tokenizer)
        self._markers = special_ids(self.tokenizer) | self.stop_ids

    @classmethod
    def load(
        cls,
        source: str | None = None,
        *,
        regime: str | None = None,
        system: str | None = llava.SYSTEM,
        **options: Any,
    ) -> LladaVAdapter:
        """Load a checkpoint through upstream's package; options: those of
        :func:`~captum_dcam.adapters.llada_v.loading.loaded`."""
        model, processor = loaded(source, **options)
        return cls(model, processor, regime, system=system)

    @staticmethod
    def owns(model: nn.Module) -> bool:
        # LaViDa's configuration has the same model_type: only the class tells them apart
        return any(c.__name__ == "LlavaLLaDAModelLM" for c in type(model).__mro__)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.model.layers)

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset((*decoding.FORBIDDEN, decoding.TURN_END, decoding.MASK))

    @property
    def mask_id(self) -> int:
        return decoding.MASK

    @property
    def fast(self) -> bool:
        """Whether Fast-dLLM is registered on the model."""
        return decoding.is_fast(self.blocks)

    # -- requests ---------------------------------------------------------------------------------

    def prepare(self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[Any]) -> Request:
        r"""Pictures and prompt of one example to a request.

        Args:
            images (sequence): one list of pictures; each becomes a base view and a mosaic, two
                grids of the layout.
            prompts (sequence): one string or conversation; it may place its pictures by
                ``<image>``, otherwise they stand in front, a line each.

        Returns:
            Request: pixels (1, K, 3, S, S), all views of all pictures; extras: ids (1, L) with
            -200 for pictures, and the pictures' (W, H) (1, n, 2).

        Raises:
            TypeError, ValueError: no picture, several examples, a video, or more tokens than the
                family's context, which upstream would cut off without a word.
        """
        visuals = llava.pictures_of(self.family, images, prompts)
        pictures = [v.frames[0] for v in visuals]
        text = llava.asked(self.tokenizer, prompts[0], visuals, self.system)
        ids = llava.ids_of(self.tokenizer, text)
        sizes = [p.size for p in pictures]
        place = llava.packed(ids, [self._tokens(s) for s in sizes])
        llava.check_length(self.family, place.length, self.model.config, sizes)
        grids = [
            grid
            for i, (size, start) in enumerate(zip(sizes, place.starts, strict=True))
            for grid in _anyres.grids(size, start, self.tiling, i)
        ]
        views = [view for p in pictures for view in _anyres.views(p, self.tiling)]
        read = self.image_processor.preprocess
        pixels = torch.stack([read(v, return_tensors="pt")["pixel_values"][0] for v in views])
        return Request(
            pixels[None].to(self.device, self.dtype),
            (torch.tensor([ids], device=self.device), torch.tensor([sizes], device=self.device)),
            Layout(tuple(grids), place.length),
            (llava.summary(prompts[0]),),
            (tuple(pictures),),
        )

    def _tokens(self, size: tuple[int, int]) -> int:
        """Tokens of one picture in the sequence; a base view alone is followed by a newline."""
        return _anyres.token_count(size, self.tiling) + (not self.tiling.pinpoints)

    def _views(self, pixels: Tensor, sizes: Tensor) -> dict[str, Any]:
        """Arguments of the family's packing: views (k, 3, S, S) of every picture, and (W, H)."""
        wh = [(int(w), int(h)) for w, h in sizes.flatten(0, 1).tolist()]
        counts = [_anyres.view_count(s, self.tiling) for s in wh]
        images = list(pixels.flatten(0, 1).split(counts))
        return {"images": images, "image_sizes": wh, "modalities": ["image"] * len(pixels)}

    def pixel_tokens(self, request: Request) -> Tensor:
        found, first = [], 0
        for width, height in request.extras[1][0].tolist():
            owners = _anyres.owners((width, height), self.tiling)
            found.append(torch.where(owners >= 0, owners + first, owners))
            first += sum(
                g.positions.numel() for g in _anyres.grids((width, height), 0, self.tiling)
            )
        return torch.cat(found)[None, :, None].expand(-1, -1, 3, -1, -1)

    def prompt_tokens(self, request: Request, example: int = 0) -> tuple[Tensor, Tensor]:
        ids, sizes = (e[example].tolist() for e in request.extras)
        place = llava.packed(ids, [self._tokens((w, h)) for w, h in sizes])
        text = ~torch.isin(place.ids, torch.tensor(sorted(self._markers)))
        return place.positions[text], place.ids[text]

    # -- decoding ---------------------------------------------------------------------------------

    def generate(
        self, request: Request, *, generator: torch.Generator | None = None, **settings: Any
    ) -> Trajectory:
        r"""Decode with the family's own ``generate`` and record it.

        Args:
            request (Request): from :meth:`prepare`.
            generator (torch.Generator, optional): for sampled decoding.
            gen_length (int, optional): tokens of the canvas. Default: 128
            block_length (int, optional), steps (int, optional): Default: ``gen_length`` both
            temperature (float, optional), cfg_scale (float, optional): Default: 0 both
            remasking (str, optional): ``low_confidence`` or ``random``.
            stopping_criteria (list of str, optional): strings that end the answer. Default:
                ``["<|eot_id|>"]``, as in the authors' demo; upstream's function has none
            generation_suffix (str, optional): text at the canvas's end, seen at every step.
            prefix_refresh_interval (int, optional): of Fast-dLLM. Default: upstream's 32

        Returns:
            Trajectory: over the whole canvas. Positions behind the stop, and the suffix, which
            nobody generated, hold EOS in ``tokens`` and are never explained; the states hold what
            the model saw there. ``confidence`` counts the ids that the decoder rules out as such.

        Raises:
            MethodError: dLLM-Cache is registered.
            TypeError, ValueError: settings that cannot work.
        """
        decoding.refuse_feature_cache(self.blocks)
        fast = self.fast
        options = decoding.checked(settings, generator, fast)
        tokenizer = self.tokenizer
        text = options["generation_suffix"]
        suffix = tokenizer.encode(text, add_special_tokens=False) if text else []
        prefix, end = request.layout.prefix_length, request.layout.image_end
        recorder = decoding.recorder_for(prefix, options, suffix, self.device)
        model = self.model
        parts = (model.model, model.lm_head, model.model.embed_tokens)
        views = self._views(request.pixels, request.extras[1])
        with seeded(generator, self.device), recorder.watching(*parts):
            result = model.generate(request.extras[0], tokenizer=tokenizer, **views, **options)
        answer = result[:, : result.shape[1] - len(suffix)]
        recorder.finish(answer)
        final = recorder.canvas.clone()
        tokens = torch.full_like(final, decoding.EOS)
        tokens[:, : answer.shape[1]] = answer
        scale = options["cfg_scale"]
        states, final_state = decoding.states_of(recorder.steps, scale, fast, final)
        own_calls = fast or scale > 0  # a replay's calls differ from these: keep no outputs
        return Trajectory(
            tokens=tokens,
            states=states,
            final_state=final_state,
            commit_step=recorder.commit_step,
            confidence=recorder.confidence.cpu(),
            regime="full",
            lengths=tuple(s.length for s in recorder.steps) if own_calls else (),
            image_end=end,
            settings=settings,
            final_step=decoding.last_runs(recorder.steps) if fast else None,
        )

    def embed(self, pixels: Tensor, *extras: Tensor) -> Tensor:
        """Embeddings (B, P, D) of the prefix, packed by the family's own code."""
        pack = self.model.prepare_inputs_labels_for_multimodal
        return pack(extras[0], None, None, None, None, **self._views(pixels, extras[1]))[4]

    def prefill(self, embedded: Tensor) -> Tensor:
        return embedded

    def rows(self, memory: Tensor, index: Tensor) -> Tensor:
        return memory[index]

    def denoise(self, memory: Tensor, *state: Tensor) -> Tensor:
        return decoding.step_logits(self.model, memory, *state)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))

    def encode(self, text: str) -> list[int]:
        return self._words.encode(text)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return self._words.pieces(ids)


def tiling_of(model: Any, image_processor: Any) -> Tiling:
    """How the checkpoint cuts pictures; ValueError where processor and tower do not fit."""
    tower, config = model.get_vision_tower(), model.config
    tile, side = int(tower.image_size), int(tower.num_patches_per_side)
    crop = image_processor.crop_size["height"]
    if crop != tile:
        raise InputError(
            f"the image processor makes tiles of {crop} px, the vision tower sees {tile}: load "
            "both from one checkpoint"
        )
    pinpoints, most = llava.cutting_of(config, tile)
    base = "stretch" if pinpoints else "pad"
    red, green, blue = (int(255 * m) for m in image_processor.image_mean)
    cell = float(tower.config.patch_size)
    return Tiling(tile, side, cell, pinpoints, base, (red, green, blue), most)
