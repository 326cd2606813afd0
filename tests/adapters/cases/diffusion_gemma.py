"""DiffusionGemma: a tiny random instance of transformers' own classes, one canvas and several."""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from captum_dcam.testing import AdapterCase, Reference

sys.path.insert(0, str(Path(__file__).parents[1]))  # importlib mode does not

import made_diffusion_gemma as made_dg

C, SEED = made_dg.CANVAS, 0


def reference(adapter, request, settings):
    """The family's own ``generate``; its forward's canvases and logits caught on the way."""
    settings, model, seen = dict(settings), adapter.model, []
    prefix = request.extras[0].shape[1]
    original = type(model).forward

    def spy(self, **kwargs):
        out = original(self, **kwargs)
        seen.append((kwargs["decoder_input_ids"].clone(), out.logits.clone()))
        return out

    type(model).forward = spy
    try:
        with torch.random.fork_rng(devices=[]):
            own = torch.Generator().manual_seed(SEED)
            torch.manual_seed(int(torch.randint(2**31, (), generator=own)))
            out = model.generate(
                input_ids=request.extras[0],
                pixel_values=request.pixels.flatten(0, 1),
                image_position_ids=request.extras[2].flatten(0, 1),
                mm_token_type_ids=(request.extras[0] == model.config.image_token_id).long(),
                max_new_tokens=settings.pop("gen_length"),
                max_denoising_steps=settings.pop("steps"),
                **settings,
            )
    finally:
        type(model).forward = original
    tokens = out.sequences[:, prefix:]
    count = tokens.shape[1] // C
    steps = len(seen) // count
    canvases, logits, commits = [], [], []
    for number in range(count):
        own = slice(number * C, number * C + C)
        part = seen[number * steps : number * steps + steps]
        drafts = torch.stack([x.argmax(-1) for _, x in part])
        number_of = torch.arange(1, steps + 1, device=drafts.device)[:, None, None]
        last = torch.where(drafts != drafts[-1], number_of, 0)
        commits.append(last.amax(0) + number * steps)
        for ids, values in part:
            canvases.append(torch.zeros_like(tokens))
            canvases[-1][:, : own.start] = tokens[:, : own.start]
            canvases[-1][:, own] = ids
            logits.append(values.new_full((*tokens.shape, values.shape[-1]), torch.nan))
            logits[-1][:, own] = values
    return Reference(tokens, logits, torch.stack(canvases), torch.cat(commits, 1))


@contextmanager
def float64():
    """Norms and softmax in the type of their input: the family's compute in float32."""
    made_dg.tokenizer()  # skips where transformers does not have the family
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as family

    norm, functional = family.DiffusionGemmaRMSNorm.forward, torch.nn.functional
    softmax = functional.softmax

    def exact(self, x):
        scale = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * scale * (self.weight if self.with_scale else 1)

    family.DiffusionGemmaRMSNorm.forward = exact
    functional.softmax = lambda x, dim=None, dtype=None, **_: softmax(x, dim=dim)
    try:
        yield
    finally:
        family.DiffusionGemmaRMSNorm.forward = norm
        functional.softmax = softmax


def make(dtype=torch.float32):
    return made_dg.adapter(dtype=dtype)


def case(canvases):
    # with this threshold every canvas takes all its steps
    settings = dict(gen_length=canvases * C, steps=4, confidence_threshold=1e-9)
    return AdapterCase(
        f"diffusion_gemma, {canvases} canvas{'es' * (canvases > 1)}",
        make,
        reference,
        settings=settings,
        one_token=dict(gen_length=1, steps=1),
        shortest=C,
        seed=SEED,
        prompt="what is this ?",
        other_prompt="what is that ?",  # as many tokens: a batch needs them
        feasible=(0,),
        float64=float64,
        source="transformers",
    )


CASES = [case(1), case(2)]
