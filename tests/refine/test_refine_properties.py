"""What holds of every refinement: finite, in range, same shape and dtype, batch = single."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refine import loops
from refine.shared import (
    CONTEXT,
    DTYPES,
    FUNCTIONS,
    arrays,
    close,
    each,
    few,
    random_maps,
)

from captum_dcam.refine import paper_refinements

every = pytest.mark.parametrize("name", FUNCTIONS)
NORMALISES = {"min_max", "affinity", "affinity_uncentred", "paper"}


@every
@few
@given(array=arrays(), dtype=st.sampled_from(DTYPES))
def test_finite_same_shape_same_dtype_in_range(name, array, dtype):
    maps = torch.from_numpy(array).to(dtype)
    before = maps.clone()
    result = FUNCTIONS[name](maps)
    assert result.shape == maps.shape and result.dtype == dtype
    assert torch.equal(maps, before)
    assert result.isfinite().all() and (result >= 0).all()
    top = torch.ones(1, dtype=dtype) if name in NORMALISES else maps.amax((-2, -1), keepdim=True)
    assert (result <= top).all()
    assert torch.equal(FUNCTIONS[name](maps), result)  # and nothing random


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_tiny_and_degenerate_maps(name, dtype):
    for shape in ((1, 1), (1, 9), (9, 1), (2, 2), (13, 6)):
        check_huge_tiny_and_degenerate_maps(FUNCTIONS[name], dtype, shape)


def check_huge_tiny_and_degenerate_maps(function, dtype, shape):
    info = torch.finfo(dtype)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one_pixel = torch.zeros(shape, dtype=torch.float64)
    one_pixel[0, -1] = 1
    scales = (info.max, info.max * 1e-3, info.tiny, info.tiny * info.eps, 0.0, 1.0)
    bases = (torch.ones_like(noise), noise, one_pixel)
    maps = torch.stack([base * scale for base in bases for scale in scales]).to(dtype)
    result = function(maps)
    assert result.isfinite().all() and (result >= 0).all()
    assert (result <= maps.amax().clamp(min=1)).all()


@every
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3)])
def test_a_batch_is_its_maps_one_by_one(name, lead):
    maps = torch.from_numpy(random_maps(50, *lead, 9, 12))
    result = FUNCTIONS[name](maps)
    for index in np.ndindex(*lead):
        torch.testing.assert_close(result[index], FUNCTIONS[name](maps[index]))


@every
@few
@given(array=arrays())
def test_a_batch_is_its_maps_one_by_one_whatever_the_maps(name, array):
    maps = torch.from_numpy(array)
    result = FUNCTIONS[name](maps)
    for index in np.ndindex(*maps.shape[:-2]):
        torch.testing.assert_close(result[index], FUNCTIONS[name](maps[index]))


@every
def test_permuting_the_batch_permutes_the_result(name):
    maps = torch.from_numpy(random_maps(51, 6, 8, 8))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(FUNCTIONS[name](maps[order]), FUNCTIONS[name](maps)[order])


@every
def test_mirrors_and_transposes_pass_through(name):
    maps = torch.from_numpy(random_maps(52, 4, 9, 12))
    result = FUNCTIONS[name](maps)
    for turn in (lambda m: m.flip(-1), lambda m: m.flip(-2), lambda m: m.mT):
        torch.testing.assert_close(FUNCTIONS[name](turn(maps)), turn(result))


@every
def test_views_and_autograd_tensors_are_taken(name):
    maps = torch.from_numpy(random_maps(53, 3, 16, 16))
    expected = FUNCTIONS[name](maps[:, ::2, 1::3])
    strided = FUNCTIONS[name](maps.clone().requires_grad_()[:, ::2, 1::3])
    assert not strided.requires_grad
    torch.testing.assert_close(strided, expected)
    broadcast = maps[0].expand(4, 16, 16)
    torch.testing.assert_close(FUNCTIONS[name](broadcast)[3], FUNCTIONS[name](maps[0]))


@every
def test_the_result_does_not_share_memory_that_a_caller_could_spoil(name):
    for maps in (torch.zeros(2, 4, 4), torch.from_numpy(random_maps(54, 2, 6, 6))):
        before = maps.clone()
        FUNCTIONS[name](maps).fill_(7)
        assert torch.equal(maps, before)


@every
def test_an_empty_batch_gives_an_empty_batch(name):
    assert FUNCTIONS[name](torch.zeros(0, 5, 7)).shape == (0, 5, 7)
    assert FUNCTIONS[name](torch.zeros(2, 0, 5, 7)).shape == (2, 0, 5, 7)


# The preset rounds after each of its stages, so that its thresholds may fall otherwise.
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "paper"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fp32_rounded(name, dtype):
    maps = torch.from_numpy(random_maps(55, 4, 10, 10)).to(dtype)
    torch.testing.assert_close(FUNCTIONS[name](maps), FUNCTIONS[name](maps.float()).to(dtype))


@every
def test_deterministic_algorithms_suffice(name):
    maps = torch.from_numpy(random_maps(56, 4, 10, 10))
    expected = FUNCTIONS[name](maps)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(FUNCTIONS[name](maps), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every
def test_cuda_gives_the_same(name):
    for dtype in DTYPES:
        maps = torch.from_numpy(random_maps(57, 8, 12, 15)).to(dtype)
        result = FUNCTIONS[name](maps.cuda())
        assert result.is_cuda
        torch.testing.assert_close(result.cpu(), FUNCTIONS[name](maps))


@pytest.mark.parametrize("shape", [(16, 20), (24, 24), (1, 9), (6, 1), (1, 1)])
def test_the_paper_preset_is_the_loops_stage_by_stage(shape):
    # Each stage gets what the stage before really returned: thresholds on values that differ in
    # the last bit would fall otherwise, and no tolerance could tell that from an error.
    stages = (
        loops.min_max,
        lambda image: loops.akd(image, 40, 600),
        loops.dacg,
        loops.cba,
        loops.min_max,
        loops.sicd,
    )
    maps = torch.from_numpy(random_maps(58, 10, *shape))
    for refine, loop in zip(paper_refinements(), stages, strict=True):
        result = refine(maps, CONTEXT)
        close(result, each(maps.numpy(), loop))
        maps = result
