"""LaViDa's packing: the spans of the facts, boxes of every token, low resolution, several pictures,
conversations; bad input."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from doubles import lavida as double
from doubles import lavida_bound as made
from PIL import Image

import captum_dcam
from captum_dcam.adapters.common import anyres as _anyres
from captum_dcam.adapters.lavida import adapter as lavida
from captum_dcam.model.prompts import Video

PINS = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))
REAL = _anyres.Tiling(384, 14, 27.0, PINS)
#: (W, H): canvas, rows and columns of the mosaic, tokens (upstream's code, tiny random weights)
SIZES = {
    (640, 480): ((768, 768), (22, 28), 834),
    (480, 640): ((768, 768), (28, 22), 840),
    (500, 500): ((768, 768), (28, 28), 1008),
    (768, 768): ((768, 768), (28, 28), 1008),
    (1000, 300): ((1152, 384), (12, 42), 712),
    (200, 150): ((384, 768), (10, 14), 346),
}


@pytest.fixture(scope="module")
def real():
    """Tiles as the published models have them."""
    return made.adapter("llada", tile=384, layers=2)


@pytest.mark.parametrize("size", SIZES)
def test_spans_of_the_facts(real, size):
    canvas, shape, count = SIZES[size]
    assert _anyres.best_canvas(size, PINS) == canvas
    assert _anyres.token_count(size, REAL) == count == 196 + shape[0] * (shape[1] + 1)
    request = real.prepare([[Image.new("RGB", size)]], [made.PROMPT])
    ids = request.extras[0][0].tolist()
    start = ids.index(-200)
    base, mosaic = request.layout.grids
    assert base.shape == (14, 14) and mosaic.shape == shape
    assert torch.equal(base.positions.flatten(), torch.arange(start, start + 196))
    rows = start + 196 + torch.arange(shape[0])[:, None] * (shape[1] + 1)
    assert torch.equal(mosaic.positions, rows + torch.arange(shape[1]))
    assert request.layout.prefix_length == len(ids) - 1 + count
    with torch.no_grad():
        embeds = real.embed(request.pixels, *request.extras).embeds[0]
    newlines = rows[:, 0] + shape[1]
    assert torch.equal(embeds[newlines], real.model.model.image_newline.expand(shape[0], -1))
    assert torch.equal(embeds[:start], real.model.embed(request.extras[0][0, :start]))


@pytest.mark.parametrize("size", [*SIZES, (97, 61), (30, 400), (1920, 1080), (9, 7)])
def test_boxes_are_those_of_the_formulas(size):
    """Base: 27 px of 384 stretched over the picture; mosaic: 27 px of the canvas, 6 px of every
    tile unseen, less what padding shifts and resizing scales."""
    base, mosaic = _anyres.grids(size, 0, REAL)
    width, height = size
    for i in range(14):
        x0, y0, x1, y1 = base.box(i, i)
        assert (x0, x1) == pytest.approx((27 * i * width / 384, 27 * (i + 1) * width / 384))
        assert (y0, y1) == pytest.approx((27 * i * height / 384, 27 * (i + 1) * height / 384))
    cw, ch = _anyres.best_canvas(size, PINS)
    if cw / width < ch / height:
        nw, nh = cw, min(math.ceil(height * (cw / width)), ch)
    else:
        nw, nh = min(math.ceil(width * (ch / height)), cw), ch
    px, py = (cw - nw) // 2, (ch - nh) // 2
    h, w = (14 * (c // 384) for c in (ch, cw))
    row, column = (h - mosaic.shape[0]) // 2, (w - mosaic.shape[1]) // 2
    for r, c in ((0, 0), (mosaic.shape[0] - 1, mosaic.shape[1] - 1), (mosaic.shape[0] // 2, 0)):
        x0, y0, x1, y1 = mosaic.box(r, c)
        left = 384 * ((c + column) // 14) + 27 * ((c + column) % 14)
        upper = 384 * ((r + row) // 14) + 27 * ((r + row) % 14)
        assert x0 == pytest.approx((left - px) * width / nw)
        assert x1 == pytest.approx((left + 27 - px) * width / nw)
        assert y0 == pytest.approx((upper - py) * height / nh)
        assert y1 == pytest.approx((upper + 27 - py) * height / nh)


@pytest.mark.parametrize(
    ("pins", "side", "cell", "most", "size", "count"),
    (
        # LLaDA-V: 729 base tokens, mosaics of more than four tiles' tokens reduced
        ("(1x1),...,(6x6)", 27, 14.0, 4, (384, 384), 1485),
        ("(1x1),...,(6x6)", 27, 14.0, 4, (500, 375), 1728),
        ("(1x1),...,(6x6)", 27, 14.0, 4, (640, 480), 2929),
        ("(1x1),...,(6x6)", 27, 14.0, 4, (1024, 768), 3627),
        ("(1x1),...,(6x6)", 27, 14.0, 4, (1920, 1080), 3649),
        ("(1x1),...,(6x6)", 27, 14.0, 4, (1000, 200), 2123),
        # LaViDa-O: 13×13 a tile
        (str(list(PINS)), 13, 28.0, None, (1024, 1024), 871),
        (str(list(PINS)), 13, 28.0, None, (500, 375), 416),
        (list(PINS), 13, 28.0, None, (640, 480), 709),
        (PINS, 13, 28.0, None, (1920, 1080), 547),
        ([list(p) for p in PINS], 13, 28.0, None, (384, 384), 365),
    ),
)
def test_spans_of_families_with_the_same_packing(pins, side, cell, most, size, count):
    tiling = _anyres.Tiling(384, side, cell, _anyres.parse_pinpoints(pins, 384), most=most)
    assert _anyres.token_count(size, tiling) == count
    grids = _anyres.grids(size, 0, tiling)
    newlines = grids[1].shape[0]
    assert sum(g.positions.numel() for g in grids) + newlines == count
    own = _anyres.owners(size, tiling)
    assert own.shape == (_anyres.view_count(size, tiling), 384, 384)
    assert sorted(own.unique().tolist()) == list(range(-1, count - newlines))


@pytest.mark.parametrize("size", [(160, 120), (100, 300), (333, 97), (9, 7)])
def test_a_pixel_changes_the_token_that_owns_it(size):
    """One pixel of a view at a time, against what the model's own packing makes of it."""
    a = made.adapter("llada", mm_spatial_pool_mode="average")
    request = a.prepare([[tiny.picture(0, size)]], [made.PROMPT])
    owners = a.pixel_tokens(request)
    positions = torch.cat([g.positions.flatten() for g in request.layout.grids])
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        plain = a.embed(request.pixels, *request.extras).embeds[0]
        for _ in range(12):
            view = int(torch.randint(request.pixels.shape[1], (), generator=g))
            y, x = torch.randint(104, (2,), generator=g).tolist()
            pixels = request.pixels.clone()
            pixels[0, view, :, y, x] += 5
            moved = (a.embed(pixels, *request.extras).embeds[0] != plain).any(1).nonzero()[:, 0]
            owner = int(owners[0, view, 0, y, x])
            expected = [] if owner < 0 else [int(positions[owner])]
            assert moved.tolist() == expected


def test_without_pooling_a_token_is_a_patch(monkeypatch):
    """NOT_ALWASY_DO_2DPOOL=1, read when upstream's package is imported."""
    monkeypatch.setattr(double, "ALWASY_DO_2DPOOL", False)
    a = made.adapter("llada", tile=384, layers=2)
    request = a.prepare([[Image.new("RGB", (640, 480))]], ["a"])
    base, mosaic = request.layout.grids
    assert base.shape == (27, 27) and mosaic.shape == (40, 54)
    assert base.box(1, 2) == pytest.approx((28 / 384 * 640, 14 / 384 * 480, 42 / 384 * 640, 35.0))
    with torch.no_grad():
        embeds = a.embed(request.pixels, *request.extras).embeds
    assert embeds.shape[1] == request.layout.prefix_length
    monkeypatch.setattr(lavida.LavidaPacking, "place", lambda *_: SimpleNamespace(length=3))
    with pytest.raises(ValueError, match=r"tokens .* where 3 were expected.*NOT_ALWASY_DO_2DPOOL"):
        a.embed(request.pixels, *request.extras)


@pytest.mark.parametrize(
    ("single", "pooled", "aspect", "count"),
    (
        ("tensor", True, "pad", 729),  # the authors' low-resolution evaluation
        ("tensor", False, "square", 729),
        ("list", True, "pad", 197),  # their predict.py
        ("list", False, "pad", 730),
    ),
)
def test_low_resolution(monkeypatch, single, pooled, aspect, count):
    monkeypatch.setattr(double, "ALWASY_DO_2DPOOL", pooled)
    a = made.adapter("dream", tile=384, layers=2, single=single, image_aspect_ratio=aspect)
    request = a.prepare([[Image.new("RGB", (400, 300))]], ["a"])
    with torch.no_grad():
        embeds = a.embed(request.pixels, *request.extras).embeds
    text = int((request.extras[0] >= 0).sum())
    assert embeds.shape[1] == request.layout.prefix_length == text + count
    (grid,) = request.layout.grids
    side, cell = (14, 27) if pooled and single == "list" else (27, 14)
    assert grid.shape == (side, side)
    x0, y0, x1, y1 = grid.box(side // 2, 1)
    scale = 400 / 384
    assert (x0, x1) == pytest.approx((cell * scale, 2 * cell * scale))
    if aspect == "pad":  # in the middle of a square of 400
        assert y0 == pytest.approx(cell * (side // 2) * scale - 50)
    else:
        assert y1 == pytest.approx(cell * (side // 2 + 1) * 300 / 384)
    out = grid.to_pixels(torch.ones(side, side))
    assert out[20, 20] == 1 and not out[:, 396:].any()  # 6 of 384 columns: no token sees them


def test_padding_has_the_processors_colour():
    a = made.adapter("llada", image_aspect_ratio="pad")
    request = a.prepare([[Image.new("RGB", (100, 50), (255, 255, 255))]], ["a"])
    grey = 127 / 127.5 - 1
    assert float(request.pixels[0, 0, 0, 0, 50]) == pytest.approx(grey, abs=1e-6)
    assert float(request.pixels[0, 0, 0, 52, 50]) == 1


def test_several_pictures_have_no_tiles(cache):
    a = made.adapter("llada", cache)
    pictures = [tiny.picture(i, size) for i, size in enumerate(((80, 60), (30, 90)))]
    request = a.prepare([pictures], ["which is red ?"])
    one, two = request.layout.grids
    assert (one.image, two.image) == (0, 1) and one.shape == two.shape == (7, 7)
    assert one.image_size == (60, 80) and two.image_size == (90, 30)
    assert request.pixels.shape == (1, 2, 3, 104, 104)
    found = captum_dcam.explain(a, pictures, "which is red ?", [0], gen_length=2)
    assert [m.shape for m in found.maps] == [(1, 7, 7)] * 2
    owners = a.pixel_tokens(request)
    assert sorted(owners.unique().tolist()) == list(range(-1, 98))


def test_conversations_and_system():
    a = made.adapter("llada", system="be a dog")
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "image"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "describe it"},
    ]
    request = a.prepare([[tiny.picture()]], [turns])
    text = a.tokenizer.decode([i for i in request.extras[0][0].tolist() if i >= 0])
    assert text.index("dog") < text.index("what") < text.index("cat") < text.index("describe")
    ids = request.extras[0][0].tolist()
    assert ids[ids.index(-200) - 1] == a.encode("what")[0]
    positions, words = a.prompt_tokens(request)
    with torch.no_grad():
        embeds = a.embed(request.pixels, *request.extras).embeds[0]
    assert torch.equal(embeds[positions], a.model.embed(words))
    assert not set(words.tolist()) & {*a.tokenizer.all_special_ids, -200}
    tokens = torch.cat([g.positions.flatten() for g in request.layout.grids])
    assert not set(positions.tolist()) & set(tokens.tolist())
    default = captum_dcam.wrap(double.model("llada"), double.processor())
    request = default.prepare([[tiny.picture()]], ["what"])
    assert len(request.extras[0][0]) > 20  # the authors' system prompt


# -- bad input -------------------------------------------------------------------------------------


def test_a_span_that_would_be_cut_off_is_refused():
    """Upstream cuts it off without a word."""
    a = made.adapter("llada", tokenizer_model_max_length=60)
    with pytest.raises(ValueError, match=r"make \d+ tokens.*tokenizer_model_max_length is 60"):
        a.prepare([[tiny.picture(0, (160, 120))]], [made.PROMPT])


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    (
        ([[tiny.picture()]] * 2, ["a", "b"], "lavida runs one at a time"),
        ([[]], ["a"], "no image was given"),
        ([[Video([tiny.picture()] * 2)]], ["a"], "lavida takes none"),
        ([[tiny.picture()]], ["<image> and <image>"], "places 2 images"),
    ),
)
def test_requests_that_cannot_work(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        made.adapter("llada").prepare(images, prompts)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio 'highres'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type 'flat'"),
        ({"mm_spatial_pool_mode": "sum"}, "mm_spatial_pool_mode is 'sum'"),
    ),
)
def test_packing_that_no_checkpoint_has(changes, message):
    with pytest.raises(ValueError, match=message):
        made.adapter("llada", **changes).prepare([[tiny.picture()]], ["a"])


def test_models_and_processors_that_do_not_fit():
    model = double.model("llada")
    with pytest.raises(TypeError, match=r"expected \(tokenizer, image_processor\)"):
        captum_dcam.wrap(model, object())
    with pytest.raises(ValueError, match="cuts 384 px, the model's vision tower takes 104 px"):
        captum_dcam.wrap(model, double.processor(384))
    with pytest.raises(ValueError, match="single is 'both'"):
        captum_dcam.wrap(model, double.processor(), single="both")
    with pytest.raises(ValueError, match="cache is 'half'"):
        captum_dcam.wrap(model, double.processor(), cache="half")
    with pytest.raises(TypeError, match="a Linear: LaViDa's are LlavaLladaForMaskedDiffusion"):
        captum_dcam.wrap(torch.nn.Linear(1, 1), double.processor(), family="lavida")
    parts = SimpleNamespace(
        tokenizer=double.Tokenizer(), image_processor=double.ImageProcessor(104)
    )
    assert captum_dcam.wrap(model, parts).family == "lavida"
    model.config.dual_tower = False  # LaViDa-O's class has the same name
    assert not lavida.LavidaAdapter.owns(model)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(base="crop"), "base is 'crop'"),
        (dict(side=28), "28 tokens of 27.0 px do not fit"),
        (dict(pinpoints=((384, 500),)), "no multiples of the tile's 384 px"),
    ),
)
def test_tilings_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        _anyres.Tiling(**{**dict(tile=384, side=14, cell=27.0, pinpoints=PINS), **change})
    with pytest.raises(ValueError, match="expected pairs"):
        _anyres.parse_pinpoints([], 384)
