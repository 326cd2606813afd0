"""LaViDa-O's double: cached, full, and with use_fast_dlm."""

import torch
from doubles import lavida_o as double

import captum_dcam
from captum_dcam.model.guard import frozen
from captum_dcam.testing import AdapterCase, Reference


def maker(cache):
    def make(dtype=torch.float32):
        made = double.model(dtype=dtype)
        return captum_dcam.wrap(made, double.processor(), cache=cache, system=None)

    return make


def reference(adapter, request, settings):
    """The double's own ``generate``; canvases and logits by hooks on its parts."""
    settings = dict(settings)
    length, fast = settings.pop("gen_length"), settings.get("use_fast_dlm", False)
    if not fast:
        settings["prefix_lm"] = adapter.cache == "prefix"
    block = settings["block_length"]
    prefix, inner = request.layout.prefix_length, adapter.model.model
    canvases, logits, whole = [], [], []

    def embedded(_module, args):
        ids = args[0]
        if ids.ndim != 2:
            return
        if ids.shape[1] == length or ids.shape[1] == prefix + length:
            whole.append(len(canvases))
            canvases.append(ids[:, -length:].clone())
        else:
            begin = (len(whole) - 1) * block
            canvases.append(canvases[-1].clone())
            canvases[-1][:, begin : begin + block] = ids

    def scored(_module, _args, output):
        if not canvases:
            return
        rows = torch.full(
            (1, length, output.logits.shape[-1]), torch.nan, dtype=output.logits.dtype
        )
        if output.logits.shape[1] >= length:
            rows[:] = output.logits[:, -length:]
        else:
            begin = (len(whole) - 1) * block
            rows[:, begin : begin + block] = output.logits
        logits.append(rows)

    handles = [
        inner.transformer.wte.register_forward_pre_hook(embedded),
        inner.register_forward_hook(scored),
    ]
    inner.set_activation_checkpointing(None)
    try:
        with frozen(inner):  # convolutions take other kernels while their weights require grad
            out = adapter.model.generate(
                request.extras[0],
                max_new_tokens=length,
                mask_id=double.MASK,
                **adapter._packing.arguments(request.pixels, request.extras[1]),
                **settings,
            )
    finally:
        for handle in handles:
            handle.remove()
        inner.set_activation_checkpointing("whole_layer")
    tokens = (out[0] if fast else out)[:, -length:]
    return Reference(tokens, logits, torch.stack(canvases))


def case(name, cache, feasible, **changes):
    return AdapterCase(
        f"lavida_o, {name}",
        maker(cache),
        reference,
        settings=dict(gen_length=8, block_length=4, **changes),
        one_token=dict(gen_length=1, block_length=1),
        feasible=feasible,
        source="double",
    )


CASES = [
    case("prefix", "prefix", (0,)),
    case("full", "none", range(8)),
    case("use_fast_dlm", "none", None, use_fast_dlm=True),
]
