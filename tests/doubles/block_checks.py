"""What tests of block-diffusion families check on doubles and on upstream's code alike."""

from contextlib import contextmanager

import torch

from captum_dcam.testing import AdapterCase, Reference

#: an answer is replayed in one run, and generated block by block
NEAR = 1e-5


@contextmanager
def steps_seen(adapter):
    """The steps of a family's own generation: of each, where its block held the mask, its logits,
    and where the block ends; written apart from the adapter's recording."""
    words = adapter.decoder.embed_tokens
    masked, logits, at = [], [], []
    calls = []

    def called(_module, _args, kwargs):
        embeds = kwargs.get("inputs_embeds")
        embeds = words(kwargs["input_ids"]) if embeds is None else embeds
        calls.append(kwargs["store_kv"])
        if not kwargs["store_kv"]:
            mask = words(torch.tensor([adapter.mask_id], device=embeds.device))
            masked.append((embeds == mask).all(-1))
            at.append(int(kwargs["position_ids"].max()) + 1)

    def headed(_module, _args, out):
        if calls and not calls[-1] and len(logits) < len(masked):
            logits.append(out.detach().clone())

    with (
        adapter.decoder.register_forward_pre_hook(called, with_kwargs=True),
        adapter.head.register_forward_hook(headed),
    ):
        yield masked, logits, at


def reference(generate):
    """``AdapterCase.reference`` of a family whose own generation is ``generate(adapter, request,
    settings)`` → its ids (1, …): canvases from where masks stood, NaN where no block ran. Or ids
    and a map of commit steps from 1 on, where it may write over tokens, and so no canvas is sure.
    """

    def made(adapter, request, settings):
        prompt = request.layout.prefix_length
        with steps_seen(adapter) as (masked, logits, at):
            tokens = generate(adapter, request, dict(settings))
        tokens, commits = tokens if isinstance(tokens, tuple) else (tokens, None)
        end = min(at[-1] - prompt, tokens.shape[1])  # the answer is cut to the length asked for
        tokens = tokens[:, :end]
        canvases, rows = [], []
        for open_, own, stop in zip(masked, logits, at, strict=True):
            first, last = max(0, stop - open_.shape[1] - prompt), stop - prompt
            hidden = torch.ones(1, max(end, last), dtype=torch.bool)
            hidden[:, :first] = False
            hidden[:, first:last] = open_[:, first - last :]
            hidden[:, last:] = True
            canvases.append(torch.where(hidden[:, :end], adapter.mask_id, tokens))
            full = torch.full((1, max(end, last), own.shape[-1]), torch.nan, dtype=own.dtype)
            full[:, first:last] = own[:, first - last :]
            rows.append(full[:, :end])
        if commits is None:
            return Reference(tokens, rows, torch.stack(canvases))
        return Reference(tokens, rows, commit_step=commits[:, :end] - 1)

    return made


def entering(adapter, request):
    """(B, N, D): image tokens as the first block gets them."""
    embeds = adapter.embed(request.pixels, *request.extras).embeds
    return embeds[:, torch.cat([g.positions.flatten() for g in request.layout.grids])]


def diffusion_vl(make, source, **changes):
    """DiffusionVL's cases: a fixed number of tokens per step, and all that are sure."""

    def generate(adapter, request, settings):
        given = adapter.inputs(request.pixels, request.extras)
        return adapter.model.generate(**given, **{"steps": adapter.block_length, **settings})

    def case(name, **settings):
        return AdapterCase(
            f"diffusion_vl, {name}",
            make,
            reference(generate),
            settings=dict(gen_length=9, **settings),
            one_token=dict(gen_length=1),
            shortest=2,  # the prompt's tail has two tokens, and a block four
            prompt="what is this red circle",
            tolerance=NEAR,
            feasible=(0,),
            image_states=entering,
            source=source,
            **changes,
        )

    sure = dict(remasking_strategy="low_confidence_dynamic", confidence_threshold=0.05)
    return [case("static"), case("dynamic", **sure)]


def mineru_diffusion(make, source, **changes):
    """MinerU-Diffusion's cases: a token a step, and fewer steps than tokens, with tokens written
    over, where ``step_map`` tells when."""

    def generate(adapter, request, settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(drawn(SEED))
            own = adapter.options(adapter.checked(settings, torch.Generator()))
            # nothing ends the answer early, so that all of it is returned
            whole = {**own, "stopping_criteria": None, "gen_length": settings["gen_length"]}
            given = adapter.inputs(request.pixels, request.extras)
            return adapter.model.generate(**given, **whole)[:2]

    def case(name, **settings):
        return AdapterCase(
            f"mineru_diffusion, {name}",
            make,
            reference(generate),
            settings=dict(gen_length=8, **settings),
            one_token=dict(gen_length=4),
            shortest=4,
            seed=SEED,
            prompt="what is this red circle",
            tolerance=NEAR,
            feasible=(0,),
            image_states=entering,
            source=source,
            **changes,
        )

    return [case("a token a step"), case("dynamic", denoising_steps=2, dynamic_threshold=0.3)]


#: of sampled decoding
SEED = 0


def drawn(seed):
    """What an adapter seeds torch with, from a generator of that seed."""
    return int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed)))


def sdar_vl(make, script, source, **changes):
    """SDAR-VL's cases; ``script(model, inputs=…, mask_id=…, …)`` is the authors' loop, or ours."""

    def generate(adapter, request, settings):
        given = adapter.inputs(request.pixels, request.extras)
        steps = {"denoising_steps": adapter.block_length, "block_length": adapter.block_length}
        ids = script(adapter.model, inputs=given, mask_id=adapter.mask_id, **{**steps, **settings})
        return ids[:, request.layout.prefix_length :]

    def case(name, **settings):
        return AdapterCase(
            f"sdar_vl, {name}",
            make,
            reference(generate),
            settings=dict(gen_length=9, **settings),
            one_token=dict(gen_length=1),
            shortest=3,  # the prompt's tail has one token, and a block four
            prompt="what is this red circle",
            tolerance=NEAR,
            feasible=(0,),
            image_states=entering,
            source=source,
            **changes,
        )

    return [
        case("dynamic", confidence_threshold=0.3),
        case("sequential", remasking_strategy="sequential", denoising_steps=3),
    ]
