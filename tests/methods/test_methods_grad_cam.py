"""pytorch-grad-cam's classes through the bridge: their formulas, and none of their traps.

The tests at the top run without the package, on a stand-in that has its habits.
"""

import functools
import sys
import types

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from captum_dcam import packages
from captum_dcam.errors import InfeasibleStepError, MethodError, MissingPackageError
from captum_dcam.methods import METHODS, AttributionTask, Budget, metered, method
from captum_dcam.methods import grad_cam_bridge as bridge
from captum_dcam.methods.base import pooled_pixels
from captum_dcam.methods.grad_cam_bridge import image_of
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target

NAMES = tuple(n for n, cls in METHODS.items() if cls.facts.group == "pytorch-grad-cam")
CHEAP = {
    "pgc_scorecam": {"channels": 3},
    "pgc_ablationcam": {"channels": 3},
    "pgc_sess": {"scales": 2},
    "pgc_dff": {"concepts": 3},
    "pgc_refinecam": {"blocks": (1, 2)},
}
COMPONENTS = ("pgc_eigengradcam", "pgc_eigencam", "pgc_kpcacam")


#: one generation for all tests that only read it
shared = functools.cache(tiny.bound)


@functools.cache
def padded():
    return single(tiny.bound("none", batch=2, prompts=["describe .", tiny.PROMPT], gen_length=1))


@pytest.fixture(scope="session")
def installed():
    """The package; skips where it is absent or does not load."""
    try:
        import pytorch_grad_cam
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"pytorch-grad-cam does not load: {error}")
    return pytorch_grad_cam


def task_of(forward, *positions, score="commit", seed=0):
    targets = tuple(Target("", (p,), (tiny.pair(forward, p)[1],)) for p in positions)
    return AttributionTask(forward, targets, score, torch.Generator().manual_seed(seed))


def run(name, this, **settings):
    made = method(name, **{**CHEAP.get(name, {}), **settings})
    made.check(this)
    return made.attribute(this)


def at_step(forward, which):
    steps = forward.trajectory.commit_step[0]
    return int(steps.argsort()[{"first": 0, "middle": len(steps) // 2, "last": -1}[which]])


# -- without the package -------------------------------------------------------------------------


class FakeGradCAM:
    """The package's habits: eval mode for good, hooks for good, gradients into every parameter,
    numpy, ReLU, min-max."""

    uses_gradients = True

    def __init__(self, model, target_layers):
        self.model = model.eval()
        self.activations_and_grads = self
        self.device = next(model.parameters()).device
        self.seen = []
        self.handles = [target_layers[0].register_forward_hook(self.save)]

    def save(self, _module, _args, output):
        self.seen.append(output.cpu().detach().numpy())
        output.register_hook(lambda g: self.seen.append(g.cpu().detach().numpy()))

    def release(self):
        for handle in self.handles:
            handle.remove()

    def get_cam_image(self, pixels, layer, targets, activations, gradients, eigen_smooth=False):
        return (gradients.mean((2, 3), keepdims=True) * activations).sum(1)

    def __call__(self, pixels, targets):
        outputs = self.model(pixels.to(self.device))
        self.model.zero_grad()
        sum(t(o) for t, o in zip(targets, outputs, strict=True)).backward(retain_graph=True)
        cam = np.maximum(self.get_cam_image(pixels, None, targets, *self.seen[:2]), 0)
        return (cam - cam.min()) / (1e-7 + cam.max())


@pytest.fixture
def fake(monkeypatch):
    module = types.ModuleType("pytorch_grad_cam")
    module.GradCAM = FakeGradCAM
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", module)
    return module


def untouched(forward, work):
    """Run ``work`` on a forward in training mode whose parameters want gradients; nothing of the
    model may differ afterwards."""
    forward.train()
    forward.model.layers[2].eval()
    for p in forward.parameters():
        p.requires_grad_(True)
    kept = next(forward.parameters())
    kept.grad = torch.ones_like(kept)
    modes = {n: m.training for n, m in forward.named_modules()}
    forward.request.pixels.requires_grad_()
    pixels = forward.request.pixels.detach().clone()
    random, numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    work()
    assert not tiny.hooks(forward) and forward.tap.edit is None
    assert modes == {n: m.training for n, m in forward.named_modules()}
    assert all(p.requires_grad for p in forward.parameters())
    assert [p for p in forward.parameters() if p.grad is not None] == [kept]
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert torch.equal(forward.request.pixels, pixels) and forward.request.pixels.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert np.array_equal(np.random.get_state()[1], numpy)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_bridge_undoes_the_habits(cache, fake, dtype):
    forward = tiny.bound(cache, dtype=dtype, images=2)
    this, found = task_of(forward, 3), []
    untouched(forward, lambda: found.append(run("pgc_gradcam", this)))
    row = target_gradients(forward, this.targets)[0]
    for i, (a, g) in enumerate(zip(row.features, row.gradients, strict=True)):
        raw = (g.float().mean((1, 2), keepdim=True) * a.float()).sum(0)
        assert tiny.relative(found[0].maps[i][0], raw) < (1e-4 if dtype == torch.float32 else 0.1)
        assert (raw < 0).any() and (raw > 0).any()  # ReLU would have shown


def test_errors_come_through_and_leave_nothing(cache, fake):
    forward = tiny.bound(cache)

    def work():
        handle = forward.model.layers[3].register_forward_hook(burst)
        with pytest.raises(IndexError, match="inside"):  # the package's own contexts swallow it
            run("pgc_gradcam", task_of(forward, 1))
        handle.remove()

    untouched(forward, work)


def burst(*_args):
    raise IndexError("inside")


def test_runs_under_no_grad_too(fake):
    forward = tiny.bound("prefix")
    with torch.no_grad():
        assert run("pgc_gradcam", task_of(forward, 1)).maps[0].any()


def test_a_missing_extra_says_how_to_get_it(monkeypatch):
    forward = tiny.bound("none")
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    for name in NAMES:
        with pytest.raises(MissingPackageError, match=r"captum-dcam\[grad-cam\].*same source"):
            method(name).check(task_of(forward, 1))

    def broken(_path):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(packages, "import_module", broken)
    with pytest.raises(MissingPackageError, match=r"torchvision::nms.*captum-dcam\[grad-cam\]"):
        method("pgc_gradcam").check(task_of(forward, 1))


def test_an_old_version_says_so(fake):
    with pytest.raises(MissingPackageError, match="has no SESS: pip install --upgrade grad-cam"):
        method("pgc_sess").check(task_of(tiny.bound("none"), 1))


def test_a_state_without_a_path_is_refused(fake):
    forward = tiny.bound("none", keep=False)
    handle = forward.model.layers[2].register_forward_hook(lambda _m, _a, out: (out[0].detach(),))
    with pytest.raises((InfeasibleStepError, ValueError)):
        run("pgc_gradcam", task_of(forward, 1))
    handle.remove()


def test_a_grid_and_its_picture():
    forward = tiny.bound("none", images=2)
    this = task_of(forward, 1)
    assert [image_of(this, g) for g in (0, 1)] == [0, 1]
    owners = forward.adapter.pixel_tokens(forward.request)
    forward.adapter.pixel_tokens = lambda _request: owners * 0
    with pytest.raises(MethodError, match=r"grid 1 is computed from the images \[\]"):
        image_of(this, 1)
    with pytest.raises(MethodError, match=r"grid 0 is computed from the images \[0, 1\]"):
        image_of(this, 0)
    forward.bind(
        types.SimpleNamespace(
            **{**vars(forward.request), "pixels": torch.ones(1, 5, 7), "batch": 1}
        ),
        forward.trajectory,
    )
    with pytest.raises(MethodError, match=r"pixels are \(1, 5, 7\)"):
        image_of(task_of(forward, 1), 0)


@pytest.mark.parametrize(
    ("name", "setting"),
    (
        ("pgc_scorecam", {"channels": 0}),
        ("pgc_ablationcam", {"batch_size": 0}),
        ("pgc_sess", {"scales": 1.5}),
        ("pgc_dff", {"concepts": -1}),
        ("pgc_finercam", {"comparisons": True}),
    ),
)
def test_settings_are_checked(name, setting):
    ((key, value),) = setting.items()
    wanted = rf"{key} is {value}(, a \w+)?: expected (a whole number|int)"
    with pytest.raises(ValueError, match=wanted):
        method(name, **setting)


def test_every_class_is_entered():
    assert len(NAMES) == 18
    assert all("grad-cam" in METHODS[n].facts.needs for n in NAMES)


# -- against the package --------------------------------------------------------------------------


def first_component(x):
    """Projection (h, w) of centred (D, h, w) on its first principal axis."""
    flat = x.flatten(1).T - x.flatten(1).T.mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat)
    return (flat @ vectors[:, values.argmax()]).view(x.shape[1:])


def kernel_component(a):
    """First component of a kernel PCA with tanh(x·y / D + 1), by its double-centred matrix."""
    flat = a.flatten(1).T - a.flatten(1).T.mean(0)
    kernel = torch.tanh(flat @ flat.T / flat.shape[1] + 1)
    middle = torch.eye(len(flat)).double() - 1 / len(flat)
    values, vectors = torch.linalg.eigh(middle @ kernel @ middle)
    return (vectors[:, -1] * values[-1].sqrt()).view(a.shape[1:])


def fem(a):
    flat = a.flatten(1)
    high = flat > (flat.mean(1) + 2 * flat.std(1, correction=0))[:, None]
    return sum(high[k].double().mean() * a[k] for k in range(len(a)))


def plus_plus(a, g):
    alpha = g**2 / (2 * g**2 + g**3 * a.sum((1, 2))[:, None, None] + 1e-6)
    return sum((alpha[k] * g[k].relu()).sum() * a[k] for k in range(len(a)))


FORMULAS = {
    "pgc_gradcam": lambda a, g: sum(g[k].mean() * a[k] for k in range(len(a))),
    "pgc_hirescam": lambda a, g: sum(g[k] * a[k] for k in range(len(a))),
    "pgc_elementwise": lambda a, g: sum((g[k] * a[k]).relu() for k in range(len(a))),
    "pgc_gradcam_plus_plus": plus_plus,
    "pgc_xgradcam": lambda a, g: sum(
        (g[k] * a[k]).sum() / (a[k].sum() + 1e-7) * a[k] for k in range(len(a))
    ),
    "pgc_layercam": lambda a, g: sum(g[k].relu() * a[k] for k in range(len(a))),
    "pgc_eigengradcam": lambda a, g: first_component(g * a),
    "pgc_segeigencam": lambda a, g: first_component(g.abs() * a),
    "pgc_eigencam": lambda a, g: first_component(a),
    "pgc_kpcacam": lambda a, g: kernel_component(a),
    "pgc_fem": lambda a, g: fem(a),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("which", ("first", "last"))
def test_formulas(installed, cache, name, which):
    forward = shared(cache, images=2)
    this = task_of(forward, at_step(forward, which))
    found, row = run(name, this), target_gradients(forward, this.targets)[0]
    for i, (a, g) in enumerate(zip(row.features, row.gradients, strict=True)):
        expected = FORMULAS[name](a.double(), g.double())
        one = found.maps[i][0]
        if name in COMPONENTS or name == "pgc_segeigencam":
            assert one.max() >= -one.min()
            expected = expected if expected.max() >= -expected.min() else -expected
        assert tiny.relative(one, expected) < 2e-3, name


@pytest.mark.parametrize("cls", ("GradCAM", "LayerCAM", "GradCAMElementWise"))
def test_the_packages_own_map_is_ours_cut_and_stretched(installed, cls):
    """The package used directly, as its readme says, on a model nobody minds changing."""
    forward = tiny.bound("none")
    this = task_of(forward, 2)
    name = {"GradCAMElementWise": "pgc_elementwise"}.get(cls, f"pgc_{cls.lower()}")
    ours = run(name, this).maps[0][0].relu()

    class Naive(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = forward

        def forward(self, pixels):
            return self.inner(pixels[:, None], *this.arguments(2))[:, 2]

    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cam = getattr(installed, cls)(Naive(), [forward.tap])
    pixels = forward.request.pixels[:, 0]
    theirs = cam(pixels, [ClassifierOutputTarget(this.targets[0].token_ids[0])])[0]
    cam.activations_and_grads.release()
    import cv2

    ours = torch.as_tensor(cv2.resize((ours - ours.min()).numpy(), (64, 64)))
    ours = (ours - ours.min()) / (ours - ours.min()).max()
    assert tiny.relative(ours, torch.as_tensor(theirs)) < 1e-4


@pytest.mark.parametrize("comparisons", (1, 3))
def test_finer_cam_is_this_librarys_with_weights_by_probability(installed, cache, comparisons):
    forward = shared(cache)
    for position in range(8):
        this = task_of(forward, position)
        row = forward.replay(torch.tensor([0]), torch.tensor([this.step(position)]))[0, position]
        if int(row.argmax()) == this.targets[0].token_ids[0]:
            break
    theirs = run("pgc_finercam", this, alpha=0.6, comparisons=comparisons)
    ours = method("finer_cam", gamma=0.6, comparisons=comparisons, weights="probability")
    assert tiny.relative(theirs.maps[0], ours.attribute(this).maps[0]) < 1e-3
    # and the package's own choice of rivals
    token = this.targets[0].token_ids[0]
    view = bridge.View(this, position, 0)
    cam = installed.FinerCAM(view, [view.layer])
    with bridge.noted(cam.base_cam) as seen:
        kinds = list(range(1, comparisons + 1))
        cam(view.dummy, alpha=0.6, comparison_categories=kinds, target_idx=token)
    assert tiny.relative(theirs.maps[0], torch.as_tensor(seen[0])) < 1e-5


def strongest(a, count):
    return a.flatten(1).double().var(1).argsort(descending=True)[:count].sort().values.tolist()


def test_score_cam_by_hand(installed, cache):
    forward = shared(cache, images=2)
    this = task_of(forward, 5)
    token, args = this.targets[0].token_ids[0], this.arguments(5)
    found = run("pgc_scorecam", this, channels=5, batch_size=2)
    row = target_gradients(forward, this.targets)[0]
    for i, a in enumerate(row.features):
        order, scores = strongest(a, 5), []
        for k in order:
            mask = nn.functional.interpolate(
                a[None, k : k + 1], (64, 64), mode="bilinear", align_corners=True
            )[0]
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            pixels = this.pixels.clone()
            pixels[0, i] *= mask
            with torch.no_grad():
                scores.append(forward(pixels, *args)[0, 5, token].double())
        weights = torch.stack(scores).softmax(0)
        expected = sum(w * a[k] for w, k in zip(weights, order, strict=True))
        assert tiny.relative(found.maps[i][0], expected) < 1e-3


def test_ablation_cam_by_hand_whatever_the_batch(installed, cache):
    forward = shared(cache, images=2)
    this = task_of(forward, 5)
    token, args = this.targets[0].token_ids[0], this.arguments(5)
    found = run("pgc_ablationcam", this, channels=5, batch_size=2)
    other = run("pgc_ablationcam", this, channels=5, batch_size=5)
    row = target_gradients(forward, this.targets)[0]

    def logit(edit=None):
        with torch.no_grad(), forward.edited(edit):
            return forward(this.pixels, *args)[0, 5, token].double()

    def without(channel, grid):
        def edit(features, index):
            features = features.clone()
            features[:, channel] *= index != grid
            return features

        return edit

    whole = logit()
    for i, a in enumerate(row.features):
        falls = {k: whole - logit(without(k, i)) for k in strongest(a, 5)}
        expected = sum(fall * a[k] for k, fall in falls.items())
        assert tiny.relative(found.maps[i][0], expected) < 1e-3
        assert tiny.relative(other.maps[i], found.maps[i]) < 1e-3


def test_refine_cam_is_the_product_over_blocks(installed, cache):
    forward, filled = shared(cache), 0
    for position in range(8):
        expected = torch.ones(8, 8)
        for block in (0, 1):  # half-way to the forward's block, and that block
            other = DenoisingForward(forward.adapter, block)
            other.bind(forward.request, forward.trajectory)
            one = run("pgc_gradcam_plus_plus", task_of(other, position)).maps[0][0].relu()
            expected *= (one - one.min()) / (one - one.min()).max().clamp_min(1e-9)
        expected = (expected - expected.min()) / (expected - expected.min()).max().clamp_min(1e-9)
        found = run("pgc_refinecam", task_of(forward, position), blocks=()).maps[0][0]
        assert torch.allclose(found, expected, atol=1e-4)
        two = run("pgc_refinecam", task_of(forward, position), blocks=(0, 1)).maps[0][0]
        assert torch.equal(two, found)
        filled += bool(found.any())
    assert filled >= 2  # some are empty: negative everywhere in one block


def test_sess_of_one_window_is_grad_cam_blurred(installed, cache):
    import cv2

    forward = shared(cache)
    this = task_of(forward, 4)
    one = run("pgc_gradcam", this).maps[0][0].relu().numpy()
    one = cv2.resize((one - one.min()) / (one - one.min()).max(), (64, 64))
    one = cv2.GaussianBlur(one, (11, 11), 5.0, 0)
    one = torch.as_tensor((one - one.min()) / (one - one.min()).max())
    owners = forward.adapter.pixel_tokens(forward.request)
    expected = pooled_pixels(one.expand(1, 1, 3, 64, 64), owners, this.shapes)[0]
    assert tiny.relative(run("pgc_sess", this, scales=1).maps[0][0], expected) < 1e-3


def test_concepts_by_hand(installed, cache):
    from sklearn.decomposition import NMF

    forward = shared(cache)
    this = task_of(forward, 4)
    row = target_gradients(forward, this.targets)[0]
    a, g = row.features[0].flatten(1).numpy(), row.gradients[0].flatten(1).numpy()
    model = NMF(n_components=3, init="random", random_state=0)
    with pytest.warns(match="Maximum number of iterations"):  # ours keeps it to itself
        w = model.fit_transform(a - a.min(1, keepdims=True))
    expected = sum((g.mean(1) * w[:, k]).sum() * model.components_[k] for k in range(3))
    found = run("pgc_dff", this).maps[0][0].flatten()
    assert tiny.relative(found, torch.as_tensor(expected)) < 1e-3


def test_random_cam_follows_the_generator(installed):
    forward = shared("prefix")
    one, two, other = (run("pgc_randomcam", task_of(forward, 1, seed=s)).maps[0] for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(1)))
    weights = np.random.RandomState(seed).uniform(-1, 1, size=(1, 48))[0]
    a = target_gradients(forward, task_of(forward, 1).targets)[0].features[0]
    expected = sum(w * a[k].double() for k, w in enumerate(weights))
    assert tiny.relative(one[0], expected) < 1e-4


@pytest.mark.parametrize("which", ("first", "last"))
@pytest.mark.parametrize("name", NAMES)
def test_not_blind_at_any_step_or_marked(installed, cache, name, which):
    forward = shared(cache)
    position = at_step(forward, which)
    token = tiny.pair(forward, position)[1]
    maps = []
    for t in (token, (token + 7) % 50):
        generator = torch.Generator().manual_seed(0)
        this = AttributionTask(forward, (Target("", (position,), (t,)),), "commit", generator)
        maps.append(run(name, this).maps[0])
        assert maps[-1].any() and maps[-1].dtype == torch.float32
    assert (tiny.relative(*maps) < 1e-6) == METHODS[name].facts.target_blind


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_and_padding(installed, name):
    half = shared("prefix", dtype=torch.bfloat16)
    found = run(name, task_of(half, 2)).maps[0]
    assert torch.isfinite(found).all() and found.any()
    short = padded()
    assert (~short.request.extras[1].bool()).any()
    # empty where the map of one block is negative everywhere
    assert run(name, task_of(short, 0)).maps[0].any() or name == "pgc_refinecam"


@pytest.mark.parametrize("fails", (False, True))
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind(installed, name, fails):
    forward = tiny.bound("prefix")

    def work():
        if not fails:
            run(name, task_of(forward, 1))
            return
        handle = forward.model.layers[3].register_forward_hook(burst)
        with pytest.raises(IndexError, match="inside"):
            run(name, task_of(forward, 1))
        handle.remove()

    untouched(forward, work)


def test_bars_and_budget(installed, capfd):
    forward = shared("none")
    for name in ("pgc_scorecam", "pgc_ablationcam"):
        with metered(forward, Budget(passes=3)):
            found = run(name, task_of(forward, 1, 2), channels=6, batch_size=2)
        assert not found.done.any() and "3 forward passes" in found.note
        run(name, task_of(forward, 1))
    assert capfd.readouterr() == ("", "")
    from pytorch_grad_cam import ablation_cam, score_cam

    assert callable(score_cam.tqdm.tqdm) and score_cam.tqdm is ablation_cam.tqdm
