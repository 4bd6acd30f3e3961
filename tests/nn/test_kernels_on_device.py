"""The GPU kernels against float64: on a GPU, or in Triton's interpreter (see test_kernels.py)."""

import os

import pytest
import torch
from torch.nn.functional import batch_norm

from bnlib.nn import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU here: test_kernels.py runs this file interpreted", allow_module_level=True)
pytestmark = [] if INTERPRETED else pytest.mark.gpu

EPS = 1e-5

# Sums of a few hundred float32 numbers, each rounded to 6e-8 of its size.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 2**-10,  # one unit in the last place: y and dx are rounded to the type
    torch.bfloat16: 2**-7,  # likewise; the interpreter cuts off where a GPU rounds
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

SHAPES = [  # with tiles of 64 values, or 32 rows of 2 channels, most edges are ragged
    (2, 1),
    (65, 3),
    (7, 70),
    (3, 2, 45),
    (64, 1, 1, 1),
    (1, 3, 8, 8),
    (5, 3, 7, 9),
    (2, 2, 3, 5, 7),
]
CASES = pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in SHAPES),
        *(
            (shape, dtype)
            for dtype in TOLERANCE
            if dtype != torch.float32
            for shape in [(7, 70), (5, 3, 7, 9)]
        ),
    ],
    ids=str,
)
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(
        memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim]
    ),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut small tensors into many tiles, and merge them in several rounds."""
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "PARTS", 2)


def draw(shape, dtype=torch.float32, device="cpu", mean=3.0, std=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean
    return x.to(dtype).to(device)


def exact_moments(x):
    axes = [0, *range(2, x.ndim)]
    return x.double().mean(axes), x.double().var(axes, correction=0)


def exact_step(x, dy, weight, bias):
    """Return y, dx, dweight, dbias, mean and 1/std, by PyTorch's autograd in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=EPS)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, dy.double())
    mean, var = exact_moments(x)
    return y.detach(), dx, dweight, dbias, mean, (var + EPS).rsqrt()


def assert_close(actual, exact, tolerance):
    assert actual.shape == exact.shape
    scale = exact.abs().max().clamp(min=1e-300)
    assert ((actual.double() - exact).abs() <= tolerance * torch.maximum(exact.abs(), scale)).all()


def vectors(C, dtype, device):
    return (draw((C,), dtype, device, mean=1, seed=seed) for seed in (1, 2))


@pytest.mark.usefixtures("small_tiles")
class TestMoments:
    @CASES
    def test_equal_those_in_float64(self, shape, dtype, device):
        x = draw(shape, dtype, device)
        mean, var = kernels.moments(x)
        assert mean.dtype == var.dtype == torch.float64
        tolerance = min(TOLERANCE[dtype], 3e-6)  # never rounded to half precision
        for actual, exact in zip((mean, var), exact_moments(x), strict=True):
            assert_close(actual, exact, tolerance)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_in_any_memory_layout(self, layout, device):
        x = LAYOUTS[layout](draw((5, 3, 7, 9), device=device))
        for actual, exact in zip(kernels.moments(x), exact_moments(x), strict=True):
            assert_close(actual, exact, 3e-6)

    @pytest.mark.parametrize("ratio", [1e3, 1e4, 1e6])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_far_from_zero(self, ratio, layout, device):
        x = LAYOUTS[layout](draw((5, 3, 7, 9), device=device, mean=ratio, std=1))
        mean, var = kernels.moments(x)
        exact_mean, exact_var = exact_moments(x)
        assert ((mean - exact_mean).abs() <= 3e-7 * exact_var.sqrt()).all()
        assert_close(var, exact_var, 1e-6)

    def test_where_the_first_value_is_far_from_the_others(self, device):
        x = draw((500, 2), device=device)
        x[0] = 1e6
        mean, var = kernels.moments(x)
        exact_mean, exact_var = exact_moments(x)
        assert ((mean - exact_mean).abs() <= 3e-6 * exact_var.sqrt()).all()
        assert_close(var, exact_var, 3e-6)

    def test_beyond_the_largest_square_of_half_precision(self, device):
        x = draw((300, 2), torch.float16, device, mean=0, std=10_000).clamp(-60_000, 60_000)
        for actual, exact in zip(kernels.moments(x), exact_moments(x), strict=True):
            assert_close(actual, exact, 3e-6)

    def test_of_equal_values_have_no_variance(self, device):
        x = torch.full((100, 3), 12_345.678, device=device)
        mean, var = kernels.moments(x)
        assert mean.eq(x[0]).all()
        assert var.eq(0).all()

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("place", [(0, 1, 0, 0), (2, 1, 3, 4), (4, 1, 6, 8)], ids=str)
    def test_a_nan_stays_in_its_channel(self, layout, place, device):
        x = LAYOUTS[layout](draw((5, 3, 7, 9), device=device))
        x[place] = torch.nan
        mean, var = kernels.moments(x)
        assert mean.isnan().tolist() == var.isnan().tolist() == [False, True, False]


@pytest.mark.usefixtures("small_tiles")
class TestStep:
    @CASES
    def test_equals_pytorch_in_float64(self, shape, dtype, device):
        self.check(draw(shape, dtype, device), draw(shape, dtype, device, seed=3), dtype, dtype)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_in_any_memory_layout(self, layout, device):
        x, dy = (LAYOUTS[layout](draw((5, 3, 7, 9), device=device, seed=s)) for s in (0, 3))
        self.check(x, dy, torch.float32, torch.float32)

    @pytest.mark.parametrize(
        ("of_x", "of_dy"),
        [
            ("contiguous", "channels_last"),
            ("channels_last", "contiguous"),
            ("channels_last", "strided"),
        ],
    )
    def test_where_the_gradient_has_another_layout(self, of_x, of_dy, device):
        x = LAYOUTS[of_x](draw((5, 3, 7, 9), device=device))
        dy = LAYOUTS[of_dy](draw((5, 3, 7, 9), device=device, seed=3))
        self.check(x, dy, torch.float32, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_with_float_parameters_on_half_precision(self, dtype, device):
        x, dy = (draw((5, 3, 7, 9), dtype, device, seed=seed) for seed in (0, 3))
        self.check(x, dy, dtype, torch.float32)

    def check(self, x, dy, dtype, dtype_of_parameters):
        before = x.clone(), dy.clone()
        weight, bias = vectors(x.shape[1], dtype_of_parameters, x.device)
        exact = exact_step(x, dy, weight, bias)
        y, dx, dweight, dbias, mean, invstd = exact
        actual = kernels.normalize(x, mean, invstd, weight, bias)
        assert_close(actual, y, TOLERANCE[dtype])
        assert actual.dtype == dtype
        sums = kernels.reduce(dy, x, mean, invstd)
        assert_close(sums[0], dbias, min(TOLERANCE[dtype], 3e-6))
        assert_close(sums[1], dweight, min(TOLERANCE[dtype], 1e-5))
        count = x.numel() // x.shape[1]
        actual = kernels.input_gradient(dy, x, mean, invstd, weight, *sums, count)
        # dx is a difference of terms as large as weight * invstd * dy.
        scale = (weight.double() * invstd.double()).abs().max() * dy.double().abs().max()
        assert ((actual.double() - dx).abs() <= 2 * TOLERANCE[dtype] * scale).all()
        assert actual.dtype == dtype
        assert torch.equal(x, before[0])
        assert torch.equal(dy, before[1])

    @pytest.mark.parametrize("ratio", [1e3, 1e4])
    def test_far_from_zero(self, ratio, device):
        """With a mean rounded to float32, y would be off by up to 6e-8 times the ratio."""
        x, dy = (draw((5, 3, 7, 9), device=device, mean=m, std=1, seed=m) for m in (int(ratio), 1))
        self.check(x, dy, torch.float32, torch.float32)

    @pytest.mark.parametrize("has_weight", [True, False])
    @pytest.mark.parametrize("has_bias", [True, False])
    def test_without_weight_or_bias(self, has_weight, has_bias, device):
        x, dy = (draw((5, 3, 7, 9), device=device, seed=seed) for seed in (0, 3))
        given = vectors(3, torch.float32, device)
        weight, bias = (
            v if has else None for v, has in zip(given, (has_weight, has_bias), strict=True)
        )
        ones, zeros = torch.ones(3, device=device), torch.zeros(3, device=device)
        mean, invstd = torch.full((3,), 2.5, device=device), torch.full((3,), 0.7, device=device)
        filled = (ones if weight is None else weight, zeros if bias is None else bias)
        y = kernels.normalize(x, mean, invstd, weight, bias)
        assert torch.equal(y, kernels.normalize(x, mean, invstd, *filled))
        assert_close(
            y, (x.double() - 2.5) * 0.7 * filled[0].view(-1, 1, 1) + filled[1].view(-1, 1, 1), 1e-6
        )
        sums = kernels.reduce(dy, x, mean, invstd)
        dx = kernels.input_gradient(dy, x, mean, invstd, weight, *sums, 315)
        assert torch.equal(dx, kernels.input_gradient(dy, x, mean, invstd, filled[0], *sums, 315))

    def test_the_gradient_takes_the_count_that_it_is_given(self, device):
        x, dy = (draw((40, 3), device=device, seed=seed) for seed in (0, 3))
        mean, invstd = torch.full((3,), 2.5, device=device), torch.full((3,), 0.7, device=device)
        sums = [torch.full((3,), value, device=device) for value in (8.0, -5.0)]
        z_hat = (x.double() - 2.5) * 0.7
        for count in (80, torch.tensor(80.0, dtype=torch.float64, device=device)):
            dx = kernels.input_gradient(dy, x, mean, invstd, None, *sums, count)
            assert_close(dx, 0.7 * (dy.double() - 8 / 80 + z_hat * 5 / 80), 1e-6)

    def test_results_have_the_memory_format_of_an_input_with_gaps(self, device):
        x = draw((5, 3, 7, 9), device=device).contiguous(memory_format=torch.channels_last)
        mean, invstd = kernels.moments(x)
        y = kernels.normalize(x[..., ::2], mean, invstd, None, None)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y = kernels.normalize(x.contiguous()[..., ::2], mean, invstd, None, None)
        assert y.is_contiguous()

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize(
        "shape", [(5, 3, 7, 9), (5, 1, 7, 9), (5, 3, 1, 1), (2, 2, 3, 5, 7)], ids=str
    )
    def test_results_have_the_strides_of_the_input(self, layout, shape, device):
        x = LAYOUTS[layout](draw(shape, device=device))
        mean, invstd = kernels.moments(x)
        y = kernels.normalize(x, mean, invstd, None, None)
        dx = kernels.input_gradient(x, x, mean, invstd, None, mean, mean, 9)
        assert y.stride() == dx.stride() == x.stride()

    def test_a_nan_stays_in_its_channel(self, device):
        x, dy = (draw((40, 3), device=device, seed=seed) for seed in (0, 3))
        x[7, 1] = torch.nan
        mean, var = kernels.moments(x)
        sums = kernels.reduce(dy, x, mean, var)
        y = kernels.normalize(x, mean, var, None, None)
        dx = kernels.input_gradient(dy, x, mean, var, None, *sums, 40)
        for result in (sums[1][None], y, dx):
            assert result.isnan().all(0).tolist() == [False, True, False]
            assert not result[:, ::2].isnan().any()

    def test_with_offsets_of_64_bits(self, monkeypatch, device):
        narrow = kernels._tiling
        wide = {"INDEX": kernels.tl.int64}
        monkeypatch.setattr(kernels, "_tiling", lambda *of_x: {**narrow(*of_x), **wide})
        x, dy = (draw((5, 3, 7, 9), device=device, seed=seed) for seed in (0, 3))
        self.check(x, dy, torch.float32, torch.float32)
        for actual, exact in zip(kernels.moments(x), exact_moments(x), strict=True):
            assert_close(actual, exact, 3e-6)


class TestTiles:
    def test_of_the_default_size(self, device):
        for shape in [(4099, 2), (3, 2, 41, 67), (40, 130)]:
            x = draw(shape, device=device)
            for actual, exact in zip(kernels.moments(x), exact_moments(x), strict=True):
                assert_close(actual, exact, 3e-6)

    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 0), (2, 3, 0), (0, 0)], ids=str)
    def test_of_an_empty_batch(self, shape, device):
        x = torch.empty(shape, device=device)
        zeros = torch.zeros(shape[1], device=device)
        assert all(m.shape == zeros.shape and m.isnan().all() for m in kernels.moments(x))
        assert all(torch.equal(s, zeros.double()) for s in kernels.reduce(x, x, zeros, zeros))
        assert kernels.normalize(x, zeros, zeros, None, zeros).shape == shape
        assert kernels.input_gradient(x, x, zeros, zeros, None, zeros, zeros, 0).shape == shape

    def test_offsets_are_wide_where_a_tensor_is_large(self):
        tl = kernels.tl
        assert kernels._tiling(torch.float32, 128, 64, 56 * 56)["INDEX"] == tl.int32
        assert kernels._tiling(torch.float32, 2**15, 64, 2**10)["INDEX"] == tl.int64  # 2^31 values
        assert (
            kernels._tiling(torch.float32, 2**25, 63, 1)["INDEX"] == tl.int64
        )  # the last tile sticks out
        assert kernels._tiling(torch.float32, 1, 1, 2**31 - 1)["INDEX"] == tl.int64


class TestErrors:
    def test_of_a_type_without_a_kernel(self, device):
        x = torch.ones(4, 3, dtype=torch.int32, device=device)
        assert not kernels.available(x)
        with pytest.raises(ValueError, match=r"got torch.int32 on c.*available"):
            kernels.moments(x)

    def test_of_too_few_dimensions(self, device):
        with pytest.raises(ValueError, match=r"2 or more dimensions.*got \(3,\)"):
            kernels.moments(torch.ones(3, device=device))

    def test_of_a_vector_of_the_wrong_length(self, device):
        x, right, wrong = (torch.ones(shape, device=device) for shape in ((4, 3), (3,), (1,)))
        with pytest.raises(ValueError, match=r"invstd of shape \(3,\).*got \(1,\)"):
            kernels.normalize(x, right, wrong, None, None)
        with pytest.raises(ValueError, match=r"weight of shape \(3,\)"):
            kernels.normalize(x, right, right, wrong, None)
        with pytest.raises(ValueError, match=r"mean of shape \(3,\)"):
            kernels.reduce(x, x, wrong, right)
        with pytest.raises(ValueError, match=r"sum_dy of shape \(3,\)"):
            kernels.input_gradient(x, x, right, right, None, wrong, right, 4)

    def test_of_a_gradient_of_another_shape(self, device):
        x, vector = torch.ones(4, 3, device=device), torch.ones(3, device=device)
        with pytest.raises(ValueError, match=r"dy as x, of shape \(4, 3\).*got \(2, 3\)"):
            kernels.reduce(x[:2], x, vector, vector)


@DTYPES
def test_available(dtype, device):
    assert kernels.available(torch.ones(2, 3, dtype=dtype, device=device))
