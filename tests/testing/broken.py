"""The embedded model's adapter, broken in one way each."""

import dataclasses
import functools

import tiny
import torch

from captum_dcam.adapters.mini import MiniAdapter
from captum_dcam.errors import MethodError
from captum_dcam.model.layout import Grid, Layout
from captum_dcam.testing.__main__ import cases_in


def cases():
    """The embedded model's own cases by cache."""
    import pathlib

    file = pathlib.Path(__file__).parents[1] / "adapters" / "cases" / "mini.py"
    return dict(zip(tiny.CACHES, cases_in(file), strict=True))


def case(cls, cache):
    """The embedded model's case with another adapter class."""

    def make(dtype):
        return cls(tiny.model(dtype=dtype), tiny.processor(), cache)

    return dataclasses.replace(cases()[cache], make=functools.partial(make))


# -- what was recorded -----------------------------------------------------------------------------


class WrongCommits(MiniAdapter):
    def generate(self, request, **settings):
        t = super().generate(request, **settings)
        return dataclasses.replace(t, commit_step=(t.commit_step - 1).clamp_min(0))


class CanvasesNotCloned(MiniAdapter):
    def generate(self, request, **settings):
        t = super().generate(request, **settings)
        return dataclasses.replace(t, states=(t.states[0][-1:].expand_as(t.states[0]),))


class MissingStep(MiniAdapter):
    def generate(self, request, **settings):
        t = super().generate(request, **settings)
        lengths = (60,) * (t.steps if self.cache == "prefix" else t.steps - 1)
        return dataclasses.replace(t, states=(t.states[0][1:],), own_calls=True, lengths=lengths)


class OtherAnswer(MiniAdapter):
    def generate(self, request, **settings):
        t = super().generate(request, **settings)
        return dataclasses.replace(t, tokens=t.tokens.roll(1, 1))


class ConfidenceOfLogits(MiniAdapter):
    def generate(self, request, **settings):
        t = super().generate(request, **settings)
        return dataclasses.replace(t, confidence=t.confidence + 3)


class ConfidenceOfSharperLogits(MiniAdapter):
    def generate(self, request, **settings):
        t = super().generate(request, **settings)
        return dataclasses.replace(t, confidence=t.confidence**2)


class ForgetsWhatIsRead(MiniAdapter):
    def generate(self, request, **settings):
        t = super().generate(request, **settings)
        read = torch.ones(t.steps, *t.tokens.shape, dtype=torch.bool)
        read[1, :, 2] = False
        return dataclasses.replace(t, read_at=read)


# -- what a step computes --------------------------------------------------------------------------


class WrongShift(MiniAdapter):
    def denoise(self, memory, *state):
        return super().denoise(memory, *state).roll(1, 1)


class NearlyRight(MiniAdapter):
    def denoise(self, memory, *state):
        return super().denoise(memory, *state) * (1 + 1e-6)


class ChangesItsState(MiniAdapter):
    def denoise(self, memory, *state):
        out = super().denoise(memory, *state)
        if int((state[0] == self.mask_id).sum()) <= 2:  # the last step: nobody reads it again
            self.extras[0][:, -1] = 0
        return out

    def prepare(self, images, prompts):
        request = super().prepare(images, prompts)
        self.extras = request.extras
        return request


# -- where a position's logits come from -----------------------------------------------------------


class QueriesTheRowBefore(MiniAdapter):
    def query_position(self, layout, position):
        return super().query_position(layout, position) - 1


class QueriesTheEnd(MiniAdapter):
    def query_position(self, layout, position):
        return layout.prefix_length + 8 + position


class HeadWithoutNorm(MiniAdapter):
    def unembed(self, hidden):
        return torch.nn.functional.linear(hidden, self.model.embed_tokens.weight)


class HeadOfHalfTheWords(MiniAdapter):
    def unembed(self, hidden):
        return super().unembed(hidden)[..., ::2]


class ScaledHead(MiniAdapter):
    def unembed(self, hidden):
        return super().unembed(hidden) * 1.001


class NoHead(MiniAdapter):
    def unembed(self, hidden):
        raise MethodError("the family's head is not known")


# -- gradients -------------------------------------------------------------------------------------


class DetachedCache(MiniAdapter):
    def prefill(self, embedded):
        memory = super().prefill(embedded)
        if memory.cache is None:
            return memory
        cache = tuple((k.detach(), v.detach()) for k, v in memory.cache)
        return dataclasses.replace(memory, cache=cache)


class DetachedKeys(MiniAdapter):
    def prefill(self, embedded):
        memory = super().prefill(embedded)
        cache = tuple((k.detach(), v) for k, v in memory.cache)
        return dataclasses.replace(memory, cache=cache)


class ForgottenTensors(MiniAdapter):
    def memory_tensors(self, memory):
        return [v for _, v in memory.cache]

    def replace_memory(self, memory, tensors):
        new = iter(tensors)
        cache = tuple((k.detach(), next(new) if v.requires_grad else v) for k, v in memory.cache)
        return dataclasses.replace(memory, cache=cache)


class NoGradient(MiniAdapter):
    def denoise(self, memory, *state):
        with torch.no_grad():
            return super().denoise(memory, *state)


class TooDeep(MiniAdapter):
    deepest_block = 3


class TooShallow(MiniAdapter):
    deepest_block = 1


# -- feasible calls --------------------------------------------------------------------------------


class InventedLengths(MiniAdapter):
    def generate(self, request, **settings):
        t = super().generate(request, **settings)
        if self.cache == "none":
            lengths = (10,) * (t.steps - 1) + (80,)
            return dataclasses.replace(t, own_calls=True, lengths=lengths)
        lengths = (80,) * t.steps
        return dataclasses.replace(t, own_calls=True, lengths=lengths, cache="none")


class SpanCutOff(MiniAdapter):
    def generate(self, request, **settings):
        t = super().generate(request, **settings)
        return dataclasses.replace(t, image_end=t.image_end // 2)


# -- layout ----------------------------------------------------------------------------------------


class WithLayout(MiniAdapter):
    def change(self, grid: Grid) -> Grid:
        raise NotImplementedError

    def prepare(self, images, prompts):
        request = super().prepare(images, prompts)
        grids = tuple(map(self.change, request.layout.grids))
        return dataclasses.replace(request, layout=Layout(grids, request.layout.prefix_length))


class Transposed(WithLayout):
    def change(self, grid):
        return dataclasses.replace(grid, positions=grid.positions.T)


class OffByOne(WithLayout):
    def change(self, grid):
        return dataclasses.replace(grid, positions=grid.positions + 1)


class UpsideDown(WithLayout):
    def change(self, grid):
        return dataclasses.replace(grid, positions=grid.positions.flip(0))


class OneCellAside(WithLayout):
    def change(self, grid):
        step = grid.x_edges[0, 1] - grid.x_edges[0, 0]
        return dataclasses.replace(grid, x_edges=grid.x_edges + step)


class HeightAndWidthSwapped(WithLayout):
    def change(self, grid):
        return dataclasses.replace(grid, image_size=grid.image_size[::-1])


class PicturesSwapped(WithLayout):
    def change(self, grid):
        return dataclasses.replace(grid, image=1 - grid.image)

    def prepare(self, images, prompts):
        if len(images[0]) == 1:
            return MiniAdapter.prepare(self, images, prompts)
        return super().prepare(images, prompts)


class PixelsOfOthers(MiniAdapter):
    def pixel_tokens(self, request):
        return super().pixel_tokens(request).transpose(-1, -2)


# -- inputs ----------------------------------------------------------------------------------------


class RunsWhatItRefuses(MiniAdapter):
    batches = False

    def check_request(self, images, prompts):
        pass


class OnePictureOnly(MiniAdapter):
    several_images = False

    def check_request(self, images, prompts):
        pass


class NoVideoThough(MiniAdapter):
    takes_video = True


class FirstPromptForAll(MiniAdapter):
    def prepare(self, images, prompts):
        return super().prepare(images, [prompts[0]] * len(prompts))


class NoEmptyPrompt(MiniAdapter):
    def prepare(self, images, prompts):
        if "" in prompts:
            raise IndexError("list index out of range")
        return super().prepare(images, prompts)


class WithDialogue(MiniAdapter):
    def prepare(self, images, prompts):
        request = super().prepare(images, prompts)
        return dataclasses.replace(request, dialogue=self.changed(request.dialogue.clone()))


class SaysTheAnswersMark(WithDialogue):
    def changed(self, said):
        said[:, -1] = True
        return said


class ForgetsTheQuestionMark(WithDialogue):
    def changed(self, said):
        said[:, -2] = False
        return said


class SaysNothing(WithDialogue):
    def changed(self, said):
        return said[:, :0]


class Peeking(MiniAdapter):
    """An example of a batch sees the other's picture."""

    def embed(self, pixels, *extras):
        return super().embed(pixels + 0.1 * (pixels.mean(0) - pixels), *extras)


# -- what is left behind ---------------------------------------------------------------------------


class LeavesHook(MiniAdapter):
    def generate(self, request, **settings):
        self.blocks[0].register_forward_hook(lambda *_: None)
        return super().generate(request, **settings)


class LeavesHookAfterErrors(MiniAdapter):
    def generate(self, request, **settings):
        handle = self.blocks[0].register_forward_hook(lambda *_: None)
        out = super().generate(request, **settings)
        handle.remove()
        return out


class LeavesAttribute(MiniAdapter):
    def embed(self, pixels, *extras):
        self.model.last_extras = extras
        return super().embed(pixels, *extras)


class LeavesMode(MiniAdapter):
    def prepare(self, images, prompts):
        self.blocks[0].train(not self.blocks[0].training)
        return super().prepare(images, prompts)


class LeavesFrozen(MiniAdapter):
    def prepare(self, images, prompts):
        next(self.model.parameters()).requires_grad_(False)
        return super().prepare(images, prompts)


class LeavesGradient(MiniAdapter):
    def embed(self, pixels, *extras):
        norm = self.model.norm.weight
        norm.grad = torch.ones_like(norm)
        return super().embed(pixels, *extras)


class LeavesOtherWeights(MiniAdapter):
    def generate(self, request, **settings):
        with torch.no_grad():
            self.model.norm.weight.mul_(1.0001)
        return super().generate(request, **settings)


class LeavesClassPatched(MiniAdapter):
    def generate(self, request, **settings):
        cls = type(self.blocks[0])
        original = cls.forward

        def forward(block, *args, **kwargs):
            return original(block, *args, **kwargs)

        cls.forward = forward
        type(self).undo.append(functools.partial(setattr, cls, "forward", original))
        return super().generate(request, **settings)

    undo: list = []  # noqa: RUF012


class LeavesConfigChanged(MiniAdapter):
    def generate(self, request, **settings):
        self.model.config.rms_norm_eps = 1e-3
        return super().generate(request, **settings)


class DrawsFromTheGlobalGenerator(MiniAdapter):
    def generate(self, request, **settings):
        torch.rand(1)
        return super().generate(request, **settings)


class SwallowsErrors(MiniAdapter):
    def generate(self, request, **settings):
        try:
            self.last = super().generate(request, **settings)
        except RuntimeError:
            pass
        return self.last
