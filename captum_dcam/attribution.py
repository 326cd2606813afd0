r"""Diffusion-CAM as a Captum layer attribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from captum._utils.common import _format_output, _format_tensor_into_tuples
from captum._utils.gradient import compute_layer_gradients_and_eval
from captum.attr import GradientAttribution, LayerAttribution
from captum.log import log_usage
from torch import Tensor

from captum_dcam import checks
from captum_dcam import maps as word_maps
from captum_dcam.errors import InputError, InputTypeError, TargetError
from captum_dcam.maps import Reading, cam
from captum_dcam.model.forward import DenoisingForward, check_pixels, holding, positions_of
from captum_dcam.model.gradients import check_gradients, diagnosed, image_features, no_path
from captum_dcam.model.layout import MODES
from captum_dcam.model.norms import passing
from captum_dcam.model.trajectory import Score
from captum_dcam.model.words import Target
from captum_dcam.presets import Preset
from captum_dcam.presets import preset as find_preset
from captum_dcam.refine import Compose, Refinement

#: Captum's targets, or the library's own for several tokens together
TargetLike = tuple[int, int] | Target | Sequence[tuple[int, int] | Target] | None


class _Interpolate:
    """``interpolate`` of the class is Captum's own; that of an instance knows the layout."""

    def __get__(self, cam: DiffusionCAM | None, owner: type) -> Callable[..., Tensor]:
        return LayerAttribution.interpolate if cam is None else cam._interpolate


class DiffusionCAM(LayerAttribution, GradientAttribution):
    r"""Which image regions made a masked-diffusion multimodal LLM write a token.

    Grad-CAM on the image tokens of a transformer block, at a denoising step in which they are still
    in the sequence (Eq. 2–4), then refinements (Section 3.2). With ``preset="paper"`` and no
    refinements the map equals Captum's ``LayerGradCam`` on the tap.

    Args:
        forward_func (DenoisingForward): the model, tapped at a block, with a bound generation.
        layer (nn.Module, optional): ``forward_func.tap``, as Captum's signature has it; which block
            it taps is the forward's. Default: that tap
        device_ids (list of int, optional): as Captum's signature has it: None, or the model's own
            device.
        preset (str or Preset, optional): the defaults of ``attribute``: a name, or a file's path.
            Default: ``"default"``

    Examples::

        >>> from captum_dcam.data.scenes import make_scene
        >>> adapter = captum_dcam.load("mini")
        >>> image = make_scene(0, 3).image
        >>> forward = DenoisingForward(adapter)
        >>> request = adapter.prepare([[image]], ["describe the image ."])
        >>> trajectory = forward.generate(request)
        >>> target = (2, int(trajectory.tokens[0, 2]))
        >>> cam = DiffusionCAM(forward)
        >>> maps = cam.attribute(request.pixels, target)
        >>> cam.to_pixels(maps).shape
        torch.Size([1, 1, 192, 192])
    """

    def __init__(
        self,
        forward_func: DenoisingForward,
        layer: torch.nn.Module | None = None,
        device_ids: list[int] | None = None,
        *,
        preset: str | Preset = "default",
    ) -> None:
        if not isinstance(forward_func, DenoisingForward):
            raise InputTypeError(
                f"forward_func is a {type(forward_func).__name__}: expected a DenoisingForward "
                "(DenoisingForward(adapter, layer))"
            )
        layer = forward_func.tap if layer is None else layer
        if layer is not forward_func.tap:
            kind = repr(layer) if isinstance(layer, int | str) else type(layer).__name__
            raise InputTypeError(
                f"layer is {kind}: expected forward_func.tap, or nothing; another block is chosen "
                "where the forward is made, DenoisingForward(adapter, layer=number)"
            )
        own = forward_func.adapter.device
        if device_ids not in (None, [own.index or 0], [own]):
            raise InputError(
                f"device_ids is {device_ids!r}: the model is on {own}, and one forward runs on one "
                f"device; leave device_ids out, or give [{own.index or 0}]"
            )
        LayerAttribution.__init__(self, forward_func, layer, device_ids)
        GradientAttribution.__init__(self, forward_func)
        self._preset = find_preset(preset)  # a file is read now, whatever becomes of it later
        self.preset = self._preset.name

    @log_usage(part_of_slo=True)
    @holding
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetLike = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = True,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        score: Score | None = None,
        step: int | None = None,
        product: str | None = None,
        center: bool | None = None,
        backward: str | None = None,
        refinements: Refinement | Sequence[Refinement] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        r"""Attribute the logit of one token per example, or a sum of several, to image tokens.

        Args:
            inputs (Tensor or tuple): pixels (R, …) like ``forward.request.pixels``: the bound
                examples' own in any order and number, or changed ones, every bound example as
                often, the rows of one behind each other (as NoiseTunnel repeats them).
            target (tuple, Target or list of them): Captum's ``(position, token_id)``, or
                :class:`~captum_dcam.model.words.Target`; one for all examples or one per example.
            additional_forward_args (tuple, optional): the request's extras, then the state, R
                rows; from ``forward.arguments``. Default: those of the bound request, at the
                score's step
            attribute_to_layer_input (bool, optional): read the tap's input. Default: False
            relu_attributions (bool, optional): keep positive evidence only (Eq. 4). Default: True
            attr_dim_summation (bool, optional): sum over channels. False gives (B, D, h, w) and
                allows no refinements. Default: True
            grad_kwargs (dict, optional): for ``torch.autograd.grad``. Default: None
            score (str or int, optional): the state whose logits are read: ``commit``, ``final``,
                ``teacher``, or the number of a denoising step. Explicit arguments hold a state
                already, so they exclude it and ``step``. Default: the preset's
            step (int, optional): the generation's call whose image states are explained (with
                a prefix cache, 0 is the prefill; without a cache the call whose logits are read
                too, whatever the score says). Default: the call that the score needs
            product (str, optional): ``pooled``, ``positionwise`` or ``plus_plus``.
            center (bool, optional): centre features over positions first.
            backward (str, optional): how gradients pass through norms, ``exact`` or
                ``constant_norms``, see :mod:`captum_dcam.model.norms`.
            refinements (Refinement or sequence, optional): transforms of maps; ``[]`` for none, to
                keep the maps' own scale. Default: the preset's

        Returns:
            Tensor or tuple: (R, 1, h, w), detached; a tuple with one per grid when the request has
            several grids of image tokens. :meth:`to_pixels` brings them to the image's pixels.

        Raises:
            InfeasibleStepError, TargetError, ValueError, TypeError: before any hook is placed.
        """
        forward: DenoisingForward = self.forward_func
        forward.trajectory.check_score(self._preset.score if score is None else score)
        reading = self._preset.reading(
            score=score, product=product, center=center, step=step, backward=backward
        )
        refine = word_maps.as_compose(
            self._preset.refinements() if refinements is None else refinements
        )
        pixels = self._pixels(inputs)
        checks.flag("attribute_to_layer_input", attribute_to_layer_input)
        checks.flag("relu_attributions", relu_attributions)
        checks.flag("attr_dim_summation", attr_dim_summation)
        if additional_forward_args is not None and (score is not None or step is not None):
            raise InputError(
                f"score={score!r}, step={step} together with additional_forward_args: the "
                "arguments hold a state already; leave the ones or the others out"
            )
        if len(refine) and not (relu_attributions and attr_dim_summation):
            raise InputError(
                "refinements need non-negative maps (B, 1, h, w): leave relu_attributions and "
                "attr_dim_summation on, or pass refinements=[]"
            )
        if step is not None:
            forward.trajectory.check_call(step)
        targets = as_targets(target, len(pixels), forward)
        if all(len(t.terms) == 1 for t in targets):
            pairs = [(t.positions[0], t.token_ids[0]) for t in targets]
            gradients, features = self._one_each(
                pixels,
                pairs,
                reading,
                additional_forward_args,
                attribute_to_layer_input,
                grad_kwargs,
            )
            maps = tuple(
                _product(f, g, reading, attr_dim_summation)
                for f, g in zip(features, gradients, strict=True)
            )
        else:
            if additional_forward_args is not None or grad_kwargs or not attr_dim_summation:
                raise InputError(
                    "a target of several tokens reads each at its own step, and one with a foil "
                    "two logits: leave out additional_forward_args, grad_kwargs and "
                    "attr_dim_summation"
                )
            features, maps = None, self._several(pixels, targets, reading)
        if relu_attributions:
            maps = tuple(m.relu() for m in maps)
        if len(refine):
            maps = self._refined(pixels, maps, refine, reading, features)
        return _format_output(len(maps) > 1, maps)

    # -- to the image's pixels ---------------------------------------------------------------------

    def to_pixels(
        self, maps: Tensor | Sequence[Tensor], mode: str = "bilinear"
    ) -> Tensor | tuple[Tensor, ...]:
        """What :meth:`attribute` returned, in the pixels of the bound request's images: as
        :meth:`captum_dcam.model.layout.Layout.to_pixels`, right for every family."""
        return self.forward_func.request.layout.to_pixels(maps, mode)

    #: Captum's static method, except on an instance: see :meth:`_interpolate`
    interpolate = _Interpolate()

    def _interpolate(
        self,
        layer_attribution: Tensor,
        interpolate_dims: int | tuple[int, ...],
        interpolate_mode: str = "nearest",
    ) -> Tensor:
        """Captum's ``interpolate`` for maps (B, C, h, w) of the bound request, each token in its
        place: equal to Captum's where one grid covers one whole image. InputError that names
        :meth:`to_pixels` where it is not defined: several grids, or another mode for a grid that
        does not cover its image."""
        grids = self.forward_func.request.layout.grids
        if len(grids) > 1 or not isinstance(layer_attribution, Tensor):
            raise InputError(
                f"interpolate takes the map of one grid, the bound request has {len(grids)} grids "
                "of image tokens: use to_pixels(maps), which puts all of them in their places"
            )
        if grids[0].whole:
            captums = LayerAttribution.interpolate
            return captums(layer_attribution, interpolate_dims, interpolate_mode)
        dims = interpolate_dims
        size = (dims, dims) if isinstance(dims, int) else tuple(dims)
        if interpolate_mode not in MODES or len(size) != 2:
            raise InputError(
                f"interpolate to {interpolate_dims} by {interpolate_mode!r}: the family does not "
                f"show the whole image, so expected (H, W) and one of {MODES}; to_pixels(maps) "
                "gives maps in the image's own pixels"
            )
        return grids[0].resized(size).to_pixels(layer_attribution, interpolate_mode)

    # -- its parts ---------------------------------------------------------------------------------

    def _pixels(self, inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The one tensor of the inputs, which a graph can hold."""
        pixels = _format_tensor_into_tuples(inputs)
        if len(pixels) != 1:
            raise InputError(
                f"inputs are {len(pixels)} tensors: expected one, pixels like "
                "forward.request.pixels"
            )
        check_pixels(pixels[0], self.forward_func.request.pixels)
        return pixels[0].clone() if pixels[0].is_inference() else pixels[0]

    def _one_each(
        self,
        pixels: Tensor,
        pairs: list[tuple[int, int]],
        reading: Reading,
        arguments: Any,
        attribute_to_layer_input: bool,
        grad_kwargs: dict[str, Any] | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Gradients and features, detached, of one token per row of pixels, read as the arguments
        say; as the reading does where there are none."""
        forward = self.forward_func
        run: Callable[..., Tensor] = forward
        if arguments is None:
            at = self._read_at(pixels, pairs, reading)
            if torch.equal(pixels, forward.request.pixels):
                run = lambda _pixels: forward.replay(*at)  # noqa: E731  # nothing below the tap
            else:
                arguments = self._arguments(*at)
        with passing(reading.backward):
            found = self._evaluate(
                run, pixels, pairs, arguments, attribute_to_layer_input, grad_kwargs
            )
        gradients, features = (tuple(one.detach() for one in kind) for kind in found)
        return gradients, features

    def _evaluate(
        self,
        run: Callable[..., Tensor],
        pixels: Tensor,
        pairs: list[tuple[int, int]],
        arguments: Any,
        attribute_to_layer_input: bool,
        grad_kwargs: dict[str, Any] | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Gradients and features at the layer, by Captum; InfeasibleStepError without a path."""
        with diagnosed(self.forward_func):
            gradients, features = compute_layer_gradients_and_eval(
                run,
                self.layer,
                pixels,
                pairs,
                arguments,
                device_ids=self.device_ids,
                attribute_to_layer_input=attribute_to_layer_input,
                grad_kwargs=grad_kwargs,
            )
        if not any(bool(g.any()) for g in gradients):
            raise no_path(self.forward_func)
        check_gradients(self.forward_func, gradients)
        return gradients, features

    def _examples(self, pixels: Tensor) -> list[int]:
        r"""Which example of the bound batch every row (R, …) of pixels belongs to.

        Rows that equal a bound example's pixels are that example's. Changed ones are known by
        their places, every example as often, which the pixels must not contradict.
        """
        bound, rows = self.forward_func.request.pixels, len(pixels)
        batch = len(bound)
        if batch == 1:
            return [0] * rows
        pixels, bound = pixels.detach(), bound.detach()
        wide = pixels.float() if pixels.itemsize < 4 else pixels
        apart = torch.stack([(wide - own).flatten(1).norm(dim=1) for own in bound], 1)
        places = [r // (rows // batch) for r in range(rows)] if rows % batch == 0 else None
        equal = apart == 0
        if bool(equal.any(1).all()):
            found = equal.int().argmax(1).tolist()
            if bool((equal.sum(1) == 1).all()):
                return found
            if rows == batch and bool(equal.diagonal().all()):
                return list(range(batch))  # examples of one image: in their own order
            doubt = "rows equal the pixels of several examples"
        elif places is None:
            doubt = "they are neither the examples' pixels, nor each example as often"
        else:
            own = apart[range(rows), places]
            wrong = (own > apart.amin(1)).nonzero().flatten().tolist()
            if not wrong:
                return places
            doubt = f"row {wrong[0]} is nearer to another example than to {places[wrong[0]]}"
        raise InputError(
            f"{rows} rows of pixels for a bound batch of {batch}: {doubt}; expected rows of "
            "forward.request.pixels, or each changed one as often, behind each other "
            "(repeat_interleave); or bind one example (captum_dcam.model.forward.single)"
        )

    def _read_at(
        self, pixels: Tensor, pairs: list[tuple[int, int]], reading: Reading
    ) -> tuple[Tensor, Tensor]:
        """Every row's example, and the step at which its token is read; each (R,)."""
        trajectory, examples = self.forward_func.trajectory, self._examples(pixels)
        positions = positions_of(pairs, len(examples), trajectory.tokens.shape[1])
        if reading.step is None or trajectory.cache == "prefix":
            both = zip(examples, positions, strict=True)
            steps = [trajectory.step_of(b, p, reading.score) for b, p in both]
        else:
            steps = [reading.step] * len(examples)
        return torch.tensor(examples), torch.tensor(steps)

    def _arguments(self, examples: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
        """Extras and state of every row."""
        forward: DenoisingForward = self.forward_func
        extras = (e[examples.to(e.device)] for e in forward.request.extras)
        return (*extras, *forward.trajectory.state_at(examples, steps))

    def _several(
        self, pixels: Tensor, targets: list[Target], reading: Reading
    ) -> tuple[Tensor, ...]:
        """Maps of sums over several tokens, each token read at its own step."""
        found = word_maps.word_maps(self._bound_to(pixels), targets, range(len(targets)), reading)
        return tuple(m.unsqueeze(1) for m in found)

    def _bound_to(self, pixels: Tensor) -> DenoisingForward:
        """The forward, bound to these rows of pixels where they are not its own."""
        forward: DenoisingForward = self.forward_func
        if torch.equal(pixels, forward.request.pixels):
            return forward
        examples = self._examples(pixels)
        other = forward.again(
            request=forward.request.rows(examples, pixels),
            trajectory=forward.trajectory.rows(examples),
        )
        other.tap = forward.tap
        return other

    def _refined(
        self,
        pixels: Tensor,
        maps: tuple[Tensor, ...],
        refine: Compose,
        reading: Reading,
        features: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, ...]:
        """Every example's maps, refined in its own context. Rows of changed pixels have features of
        their own, of the first call: the attribution's pass has read them where the prefix is
        cached."""
        forward: DenoisingForward = self.forward_func
        needed = word_maps.needs_features(refine)
        if forward.trajectory.cache == "none":  # there the pass has read its token's step
            features = None
        if not (needed or word_maps.needs_repeated(refine)):
            return word_maps.refine_words(
                maps, refine, word_maps.contexts_of(forward, None, refine)
            )
        examples = torch.tensor(self._examples(pixels))
        changed = not torch.equal(pixels, forward.request.pixels[examples.to(pixels.device)])
        if changed and needed and features is None:
            features = image_features(self._bound_to(pixels), range(len(pixels)), reading.step)
        order = examples.argsort(stable=True)  # rows by example
        parts = []
        for at in order.split(examples.unique(return_counts=True)[1].tolist()):
            example = int(examples[at[0]])
            repeated = None
            if word_maps.needs_repeated(refine):
                repeated = word_maps.repeated_maps(forward, example, reading)
            own = [f[at.to(f.device)] for f in features or ()] if changed and needed else None
            contexts = word_maps.contexts_of(
                forward, repeated, refine, example=example, step=reading.step, features=own
            )
            rows = [m[at.to(m.device)] for m in maps]
            parts.append(word_maps.refine_words(rows, refine, contexts))
        back, grids = order.argsort(), (torch.cat(grid) for grid in zip(*parts, strict=True))
        return tuple(m[back.to(m.device)] for m in grids)


def _product(features: Tensor, gradients: Tensor, reading: Reading, summed: bool) -> Tensor:
    if summed:
        found = cam(features, gradients, reading.product, reading.center)
        return found.unsqueeze(1).to(features.dtype)
    if reading.product != "pooled" or reading.center:
        raise InputError(
            "attr_dim_summation=False keeps the channels apart, which is defined for "
            "product='pooled', center=False alone"
        )
    return gradients.mean((-2, -1), keepdim=True) * features


def as_targets(target: TargetLike, batch: int, forward: DenoisingForward) -> list[Target]:
    """One :class:`Target` per example from whatever ``attribute`` accepts."""
    if target is None:
        raise TargetError("no target: pass (position, token_id), or a Target of several tokens")
    items: list[Any] = list(target) if isinstance(target, list) else [target] * batch
    if len(items) != batch:
        raise TargetError(f"{len(items)} targets for {batch} examples: give one, or one for each")
    vocabulary, length = forward.adapter.vocabulary, forward.trajectory.tokens.shape[1]
    found: list[Target] = []
    for item in items:
        pairs = [item]
        if isinstance(item, Target):
            if not item.positions or len(item.positions) != len(item.token_ids):
                raise TargetError(f"{item} needs at least one position, and a token id for each")
            pairs = list(zip(item.positions, item.token_ids, strict=True))
        positions_of(pairs, len(pairs), length)
        own = item if isinstance(item, Target) else Target(str(item), (item[0],), (item[1],))
        ids = (*own.token_ids, *(own.foil_ids or ()))
        if not all(0 <= token < vocabulary for token in ids):
            raise TargetError(
                f"token ids {ids} of {own.text!r} are out of range: the model has ids 0 to "
                f"{vocabulary - 1}"
            )
        found.append(own)
    return found
