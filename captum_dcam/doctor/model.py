"""Lines about the model itself: packages, weights, processor, prompt, image span."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, groupby

import torch
from packaging.specifiers import SpecifierSet
from PIL import Image
from torch import Tensor, nn

from captum_dcam.doctor.report import LOOK, OK, STOP, UNJUDGED, Line
from captum_dcam.doctor.subject import Subject, Unjudged
from captum_dcam.errors import ConformanceError, DcamError
from captum_dcam.model import buffers
from captum_dcam.model.adapter import Adapter, FamilyFacts, Request
from captum_dcam.model.prompts import messages_of
from captum_dcam.results.explanation import versions as own_versions
from captum_dcam.testing.case import token_positions
from captum_dcam.testing.placing import Look, check_size, entering

#: packages of others that models run with, named where they are installed
BESIDE = ("accelerate", "bitsandbytes", "flash-attn", "numpy", "peft", "tokenizers", "torchao")
#: as many equal tokens in a row are an image's, not a text's
IMAGE = 9
#: the docs' pages that tell next steps
FAMILIES, ENVIRONMENTS = "docs/families", "docs/ENVIRONMENTS.md"


def facts_of(adapter: Adapter) -> FamilyFacts:
    """What the family declares; nothing where it declares nothing."""
    return adapter.facts or FamilyFacts()


def versions(subject: Subject) -> Line:
    """Packages, and whether they are those that the family runs with."""
    found = {"python": platform.python_version(), **own_versions()}
    for name in BESIDE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    pin, device = facts_of(subject.adapter).transformers, subject.adapter.device
    found |= {"platform": platform.platform(), "device": _device(device)}
    text = ", ".join(f"{n} {found[n]}" for n in ("torch", "transformers", "captum_dcam"))
    text = f"{text}; {found['device']}; transformers{pin} expected"
    if not SpecifierSet(pin).contains(found["transformers"], prereleases=True):
        return Line(LOOK, text, f"install transformers{pin}: {ENVIRONMENTS}", found)
    return Line(OK, text, values=found)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def processor(subject: Subject) -> Line:
    """The processor, which ``wrap`` has compared with the model."""
    given = subject.adapter.processor
    parts = given if isinstance(given, list | tuple) else [given]
    names = ", ".join(type(part).__name__ for part in parts)
    return Line(OK, f"{names}: fits the model", values={"processor": names})


# -- weights ---------------------------------------------------------------------------------------


def weights(subject: Subject) -> Line:
    """Whether every weight is there and a number."""
    model = subject.model
    count = sum(p.numel() for p in model.parameters())
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    text = f"{count:,} parameters, {', '.join(kinds)}"
    lost, offloaded = _on_meta(model)
    bad = [] if lost else [n for n, t in _named(model) if not _finite(t)]
    values = {
        "parameters": count,
        "dtypes": kinds,
        "meta": lost,
        "offloaded": len(offloaded),
        "not_finite": bad,
        "trained": subject.trained,
    }
    if lost:
        step = "load it with weights (low_cpu_mem_usage and init_empty_weights leave none)"
        return Line(STOP, f"{_few(lost)} on the meta device, without numbers", step, values)
    if bad:
        step = "fetch the checkpoint again; in float16, load it in bfloat16"
        return Line(STOP, f"{_few(bad)} with NaN or infinite values", step, values)
    if offloaded:
        step = "expect it to be slow; where a gradient is refused, load it where all of it fits"
        return Line(LOOK, f"{text}; {len(offloaded)} tensors are offloaded", step, values)
    return Line(OK, f"{text}; all finite{'' if subject.trained else '; random'}", values=values)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _on_meta(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of tensors without numbers: those that nobody has, and those that accelerate fetches
    when they are needed."""
    lost: list[str] = []
    offloaded: list[str] = []
    for place, module in model.named_modules():
        hook = vars(module).get("_hf_hook")
        hooks = getattr(hook, "hooks", (hook,))
        fetched = any(getattr(one, "offload", False) for one in hooks)
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        names = [f"{place}.{name}" if place else name for name, t in own if t.is_meta]
        (offloaded if fetched else lost).extend(names)
    return lost, offloaded


def _finite(tensor: Tensor) -> bool:
    """Whether all values are numbers; without a copy. Quantised ones count as such."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()
    if not plain or tensor.is_meta or not tensor.numel():
        return True
    values = tensor.detach()
    values = values.float() if values.element_size() == 1 else values
    return all(math.isfinite(float(end)) for end in values.aminmax())


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{', '.join(names[:2])}{more}"


def repaired(subject: Subject) -> Line:
    """What ``load`` or ``wrap`` has computed again."""
    found = buffers.repaired(subject.model)
    if not found:
        return Line(OK, "nothing was wrong", values={"repaired": {}})
    return Line(
        LOOK,
        f"{buffers.counted(found)} computed again: loading left what memory held",
        "believe no answer from before; generate anew",
        {"repaired": found},
    )


# -- the prompt ------------------------------------------------------------------------------------


def template(subject: Subject) -> Line:
    """How the question is written, and whether its family's authors write it so."""
    text = _read(subject.adapter, subject.request)
    last = messages_of(subject.prompt, ())[-1]["content"]
    asked = "".join(part.get("text", "") for part in last)
    known = facts_of(subject.adapter).turns
    values = {"text": text, "authors": list(known)}
    shown = text if len(text) <= 80 else f"… {text[-80:]}"
    if not known:
        found = f"{subject.adapter.family} declares none to compare; the model reads {shown!r}"
        return Line(UNJUDGED, found, values=values)
    said = _squeezed("".join(subject.adapter.token_texts(subject.adapter.encode(asked))))
    read = _squeezed(text)
    for turn in known:
        before, after = map(_squeezed, turn.split("{}"))
        if read.endswith(said + after) and before in read:
            return Line(OK, f"the authors': {shown!r}", values=values)
    return Line(
        LOOK,
        f"not the authors': {shown!r}, expected {known[0]!r}",
        f"give the tokenizer the authors' chat template: {FAMILIES}/{subject.adapter.family}.md",
        values,
    )


def _read(adapter: Adapter, request: Request) -> str:
    """The text that the model reads, with markers; of an image's tokens in a row one."""
    ids = request.extras[0][0] if request.extras else torch.zeros(())
    if ids.ndim != 1 or ids.is_floating_point():
        raise Unjudged(f"{adapter.family} keeps no ids of the prompt in its request")
    runs = [(i, len(list(run))) for i, run in groupby(ids.tolist())]
    text = [i for i, count in runs for _ in range(1 if count >= IMAGE else count) if i >= 0]
    return "".join(adapter.token_texts(text))


def _squeezed(text: str) -> str:
    """Without blanks: tokenizers put some of their own between markers."""
    return "".join(text.split())


def special_ids(subject: Subject) -> Line:
    """The ids that decoding gives a meaning to."""
    adapter, size = subject.adapter, subject.adapter.vocabulary
    mask, stop = adapter.mask_id, sorted(adapter.stop_ids)
    values = {"mask": mask, "stop": stop, "vocabulary": size}
    inside = [i for i in stop if 0 <= i < size]
    shown = ", ".join(f"{i} {adapter.token_texts([i])[0].strip()!r}" for i in inside[:4])
    more = f" and {len(stop) - 4} more" if len(stop) > 4 else ""
    masked = "no mask" if mask is None else f"mask {mask}"
    text = f"{masked}; stop {shown or 'none'}{more}; {size:,} ids"
    if mask is not None and not 0 <= mask < size:
        return Line(STOP, text, "load tokenizer and model from one checkpoint", values)
    if not inside:
        return Line(LOOK, text, "nothing ends an answer: expect text behind its end", values)
    return Line(OK, text, values=values)


# -- the image -------------------------------------------------------------------------------------


def span(subject: Subject) -> Line:
    """Where the image's tokens lie: another image changes exactly these before the first block, and
    what changes in one place of it changes the tokens of that place."""
    adapter, request = subject.adapter, subject.request
    layout = request.layout
    places = token_positions(layout)
    shapes = " + ".join(f"{h}×{w}" for h, w in layout.shapes)
    text = (
        f"{len(places)} tokens at {int(places.min())}–{int(places.max())} of {layout.prefix_length}"
        f", grids {shapes}"
    )
    changed = _changed(subject)
    kept = [p for p in places.tolist() if not changed[p]]
    beside = sorted(set(changed.nonzero()[:, 0].tolist()) - set(places.tolist()))
    values = {
        "grids": [list(shape) for shape in layout.shapes],
        "positions": [int(places.min()), int(places.max())],
        "prefix": layout.prefix_length,
        "unmoved": len(kept),
        "moved_beside": len(beside),
    }
    step = "no map of this model can be placed: report it with this file"
    if len(places.unique()) < len(places) or 2 * len(kept) > len(places):
        return Line(STOP, f"{text}; another image changes {_count(places, kept)}", step, values)
    if kept or beside:
        found = f"another image changes {_count(places, kept)}, and {len(beside)} beside them"
        return Line(LOOK, f"{text}; {found}", "compare maps with the image; report it", values)
    try:
        check_size(adapter, request.images[0][0].size, request.prompts[0], _look(subject))
    except ConformanceError as error:
        return Line(LOOK, f"{text}; {error}", "compare maps with the image; report it", values)
    return Line(OK, f"{text}; another image changes all of these, each in its place", values=values)


def _count(places: Tensor, kept: list[int]) -> str:
    return f"{len(places) - len(kept)} of these"


def _look(subject: Subject) -> Look:
    def look(adapter: Adapter, request: Request) -> Tensor:
        # one by one: some families that take batches decode them so
        every = [_entering(subject, request.single(b)) for b in range(request.batch)]
        hidden = torch.stack(every)
        return hidden[:, token_positions(request.layout).to(hidden.device)]

    return look


def _entering(subject: Subject, request: Request) -> Tensor:
    """(L, D): what enters the first block when a request of one example is answered."""
    with torch.no_grad():
        hidden = entering(subject.adapter, request, subject.settings, subject.generator)
    return hidden[0]


def _changed(subject: Subject) -> Tensor:
    """(L,) bool: positions of the prefix whose states before the first block differ between images
    of one size: the question's, turned round, and in one colour each."""
    shown = subject.request.images[0]
    turned = [one.transpose(Image.Transpose.ROTATE_180) for one in shown]
    plain = [[Image.new("RGB", one.size, c) for one in shown] for c in ("black", "white", "blue")]
    seen = []
    for images in (shown, turned, *plain):
        request = subject.adapter.prepare_again(subject.request, images)
        hidden = _entering(subject, request)
        seen.append(hidden[: request.layout.prefix_length].float().cpu())
    return torch.stack([(one - seen[0]).abs().amax(-1) > 0 for one in seen[1:]]).any(0)


def block(subject: Subject) -> Line:
    """The block that is explained."""
    adapter = subject.adapter
    count, deepest = len(adapter.blocks), adapter.deepest_block
    values = {"blocks": count, "deepest": deepest, "recommended": adapter.recommended_block}
    try:
        subject.block = adapter.check_layer(subject.layer)
    except DcamError as error:
        step = f"leave out layer, or give 0 to {deepest}; below, block {adapter.recommended_block}"
        return Line(STOP, str(error), step, values)
    text = f"{subject.block} of 0 to {count - 1}, the deepest usable one is {deepest}"
    return Line(OK, text, values={**values, "block": subject.block})
