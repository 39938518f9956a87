"""Every metric against an independent oracle: another library, a closed form or brute force."""

import math

import numpy as np
import pytest
import torch

from accel.evaluation import metrics
from accel.evaluation.errors import EvaluationError
from accel.evaluation.weights import file_sha256


def features(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + shift


def moments(x, batch=100):
    streamed = metrics.Moments()
    for part in x.split(batch):
        streamed.update(part)
    return streamed


def frechet(a, b):
    metric = metrics.FrechetDistance()
    metric.update(a, reference=True)
    metric.update(b, reference=False)
    return metric.compute()


def test_frechet_equals_closed_form_for_commuting_covariances():
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, -1.0, 2.5])
    var_a, var_b = torch.tensor([1.0, 4.0, 0.25]), torch.tensor([9.0, 1.0, 0.0])
    expected = float((mean_a - mean_b).square().sum() + (var_a.sqrt() - var_b.sqrt()).square().sum())
    value = metrics.frechet_distance(mean_a, torch.diag(var_a), mean_b, torch.diag(var_b))
    assert value == pytest.approx(expected, rel=1e-12)


def test_frechet_equals_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid", reason="needs the eval extra")

    class Identity(torch.nn.Module):
        num_features = 48

        def forward(self, x):
            return x.flatten(1)

    a, b = features(300, 48, 0), features(280, 48, 1, shift=0.3)
    oracle = fid.FrechetInceptionDistance(feature=Identity(), normalize=True, input_img_size=(3, 4, 4))
    oracle.set_dtype(torch.float64)
    oracle.update(a.view(-1, 3, 4, 4), real=True)
    oracle.update(b.view(-1, 3, 4, 4), real=False)
    assert frechet(a, b) == pytest.approx(float(oracle.compute()), rel=1e-4)


def test_frechet_equals_scipy_sqrtm():
    linalg = pytest.importorskip("scipy.linalg", reason="needs scipy")
    a, b = features(200, 20, 2).numpy(), features(200, 20, 3, shift=1.0).numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.filterwarnings("ignore:.*disp.*:DeprecationWarning")  # what clean-fid calls scipy with
def test_frechet_equals_clean_fid():
    fid = pytest.importorskip(
        "cleanfid.fid", reason="needs clean-fid (and torchvision)", exc_type=ImportError
    )
    a, b = features(300, 48, 0), features(280, 48, 1, shift=0.3)
    numbers = [part for x in (a, b) for part in (x.numpy().mean(0), np.cov(x.numpy(), rowvar=False))]
    assert frechet(a, b) == pytest.approx(float(fid.frechet_distance(*numbers)), rel=1e-3)
    assert frechet(a, b) != pytest.approx(frechet(a, a), abs=1.0)


def test_moments_do_not_depend_on_batches_and_merge_across_processes():
    # A mean far from zero is what a naive sum of squares loses its digits on.
    x = features(500, 8, 4, shift=1e6)
    whole, parts = moments(x, 500), moments(x[:200], 7)
    parts.merge(moments(x[200:], 64))
    assert parts.n == 500
    torch.testing.assert_close(parts.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(parts.covariance, torch.cov(x.T), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(whole.covariance, parts.covariance, rtol=1e-8, atol=1e-8)


def test_too_few_images_for_a_covariance_is_said_instead_of_a_number():
    with pytest.raises(EvaluationError, match=r"n = 20 images are too few.*at least 21"):
        frechet(features(20, 20, 0), features(50, 20, 1))


def test_nan_features_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        metrics.Moments().update(torch.full((3, 2), torch.nan))


def test_kid_equals_brute_force_and_is_unbiased():
    a, b = features(30, 6, 5).numpy(), features(25, 6, 6, shift=0.5).numpy()

    def kernel(x, y):
        return (x @ y / 6 + 1) ** 3

    aa = np.mean([kernel(a[i], a[j]) for i in range(30) for j in range(30) if i != j])
    bb = np.mean([kernel(b[i], b[j]) for i in range(25) for j in range(25) if i != j])
    ab = np.mean([kernel(x, y) for x in a for y in b])
    assert metrics.kernel_inception_distance(a, b).value == pytest.approx(aa + bb - 2 * ab, rel=1e-10)
    # Two samples of one distribution: scattered around zero, not above it.
    rng = np.random.default_rng(0)
    same = [metrics.kernel_inception_distance(*rng.standard_normal((2, 40, 6))).value for _ in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(60)


def test_kid_of_pairs_does_not_take_resemblance_for_closeness():
    """Two sets of one distribution whose images come in near-identical pairs: KID is zero, as without pairs."""
    rng = np.random.default_rng(0)
    paired, naive = [], []
    for _ in range(60):
        a = rng.standard_normal((40, 6))
        b = 0.99 * a + math.sqrt(1 - 0.99**2) * rng.standard_normal((40, 6))
        paired.append(metrics.kernel_inception_distance(a, b, paired=True).value)
        naive.append(metrics.kernel_inception_distance(a, b).value)
    assert abs(np.mean(paired)) < 3 * np.std(paired) / math.sqrt(60)
    assert np.mean(naive) < -10 * np.std(naive) / math.sqrt(60)  # the negative control
    a = rng.standard_normal((3000, 6))
    assert metrics.kernel_inception_distance(a, a, paired=True, subsets=3).value == pytest.approx(
        0, abs=1e-12
    )
    with pytest.raises(ValueError, match="one length"):
        metrics.kernel_inception_distance(a, a[1:], paired=True)


def test_kid_subsets_agree_with_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid", reason="needs the eval extra")
    a, b = features(120, 16, 7), features(150, 16, 8, shift=0.5)
    value, std = metrics.kernel_inception_distance(a.numpy(), b.numpy(), subsets=200, subset_size=60)
    oracle = [
        float(kid.poly_mmd(a[torch.randperm(120)[:60]], b[torch.randperm(150)[:60]])) for _ in range(200)
    ]
    spread = math.hypot(std, np.std(oracle)) / math.sqrt(200)
    assert abs(value - np.mean(oracle)) < 4 * spread


def test_cmmd_equals_brute_force_across_block_borders():
    a, b = features(1100, 5, 9).numpy(), features(40, 5, 10).numpy()
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)

    def mean_kernel(x, y):
        return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 200).mean()

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert metrics.cmmd(7 * a, b) == pytest.approx(expected, rel=1e-9)  # length must not matter


def test_precision_recall_equals_brute_force():
    a, b = features(1030, 4, 11).numpy(), features(900, 4, 11, shift=0.3).numpy()

    def covered(queries, centres):
        own = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radii = np.sort(own, axis=1)[:, 3]
        distances = np.linalg.norm(queries[:, None] - centres[None], axis=-1)
        return (distances <= radii).any(1).mean()

    result = metrics.precision_recall(a, b)
    assert result == pytest.approx((covered(b, a), covered(a, b)))
    assert 0.05 < result.precision < 0.999  # the case is not trivial
    assert metrics.precision_recall(a, a) == (1.0, 1.0)
    # Points on the border are inside: of images that repeat, radii are zero and so are the distances.
    repeated = np.repeat(1e3 + features(40, 300, 12).numpy(), 5, axis=0)
    assert metrics.precision_recall(repeated, repeated) == (1.0, 1.0)
    assert metrics.precision_recall(repeated, repeated + 0.1) == (0.0, 0.0)


def pictures(seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 256, (3, 3, 40, 33), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-20, 21, a.shape, generator=generator)
    return a, (a + noise).clamp(0, 255).to(torch.uint8)


def test_psnr_and_ssim_equal_scikit_image():
    skimage = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    a, b = pictures()
    own_psnr, own_ssim = metrics.psnr(a, b), metrics.ssim(a, b)
    for i in range(3):
        x, y = (t[i].permute(1, 2, 0).numpy() for t in (a, b))
        assert float(own_psnr[i]) == pytest.approx(skimage.peak_signal_noise_ratio(x, y), abs=1e-5)
        expected = skimage.structural_similarity(
            x,
            y,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        assert float(own_ssim[i]) == pytest.approx(expected, abs=1e-5)


def test_psnr_and_ssim_have_the_values_they_always_had():
    """Those of versions that computed them without torchmetrics; an image as small as SSIM's window among them."""
    a, b = pictures()
    torch.testing.assert_close(metrics.psnr(a, b), values(26.869481, 26.903004, 26.848296), rtol=0, atol=1e-5)
    torch.testing.assert_close(metrics.ssim(a, b), values(0.987182, 0.987800, 0.986745), rtol=0, atol=1e-5)
    small = metrics.ssim(a[..., :11, :11], b[..., :11, :11])
    torch.testing.assert_close(small, values(0.988614, 0.987491, 0.988405), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="11 pixels, the images are 10 x 33"):
        metrics.ssim(a[..., :10, :], b[..., :10, :])


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_ssim_of_flat_bright_images_keeps_its_digits():
    """The difference of two squares near one is where float32 loses most."""
    skimage = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    a = 0.9 + 0.001 * torch.randn(
        1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    b = a.flip(-1)
    expected = np.mean(
        [
            skimage.structural_similarity(
                a[0, c].numpy(),
                b[0, c].numpy(),
                gaussian_weights=True,
                use_sample_covariance=False,
                data_range=1.0,
            )
            for c in range(3)
        ]
    )
    assert expected < 0.9999
    assert float(metrics.ssim(a, b)) == pytest.approx(expected, abs=1e-4)


def test_identical_images():
    a, _ = pictures()
    a[2] = 230  # flat
    assert torch.isinf(metrics.psnr(a, a)).all()
    torch.testing.assert_close(metrics.ssim(a, a), torch.ones(3, dtype=torch.float64), rtol=0, atol=0)
    b = a.clone()
    b[1] = 255 - a[1]
    assert metrics.ssim(a, b)[1] < 0 < 1 == metrics.ssim(a, b)[2]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """AlexNet's features with random weights: the layers as torchvision orders them, and the file that it publishes."""
    torch.manual_seed(0)
    convolutions = [
        (3, 64, 11, 4, 2),
        (64, 192, 5, 1, 2),
        (192, 384, 3, 1, 1),
        (384, 256, 3, 1, 1),
        (256, 256, 3, 1, 1),
    ]
    layers: list[torch.nn.Module] = []
    for number, (inside, outside, *shape) in enumerate(convolutions):
        layers += [torch.nn.Conv2d(inside, outside, *shape), torch.nn.ReLU()]
        layers += [torch.nn.MaxPool2d(3, 2)] * (number < 2)
    features = torch.nn.Sequential(*layers)
    file = tmp_path_factory.mktemp("alexnet") / "alexnet-owt-7be5be79.pth"
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, file)
    return features, file


def test_lpips_equals_torchmetrics(monkeypatch, trunk):
    """Theirs takes its trunk from torchvision, unless the one function that asks for it is told otherwise."""
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips", reason="needs torchmetrics")
    features, file = trunk
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: features)
    oracle = theirs._LPIPS(net="alex", pnet_rand=True)
    model = metrics.LPIPS.load(file, sha256=file_sha256(file))
    a, b = pictures(1)
    a, b = (torch.nn.functional.interpolate(x.float() / 255, (64, 80)) for x in (a, b))
    expected = oracle(a, b, normalize=True).flatten()
    assert expected.min() > 1e-4
    torch.testing.assert_close(model(a, b), expected, rtol=1e-4, atol=1e-6)
    assert float(model(a, a).abs().max()) == 0.0
    for head in model.heads[:1]:
        head.zero_()
    assert not torch.allclose(model(a, b), expected, rtol=1e-2)  # every head counts


@pytest.mark.filterwarnings("ignore:.*since 0.13.*:UserWarning:torchvision")  # lpips' way of asking
def test_lpips_equals_the_reference_package(trunk):
    """Same random trunk, same published heads: the packages must agree layer by layer."""
    reference = pytest.importorskip("lpips", reason="needs the lpips package (and torchvision)")
    features, file = trunk
    oracle = reference.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for part in ("slice1", "slice2", "slice3", "slice4", "slice5"):
        own = getattr(oracle.net, part)
        own.load_state_dict({name: features.state_dict()[name] for name in own.state_dict()})
    model = metrics.LPIPS.load(file, sha256=file_sha256(file))
    a, b = (torch.rand(2, 3, 64, 64) for _ in range(2))
    expected = oracle(a, b, normalize=True).flatten()
    torch.testing.assert_close(model(a, b), expected, rtol=1e-4, atol=1e-6)


def test_clip_score_is_cosine_in_percent_and_never_negative():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    y = torch.tensor([[4.0, 3.0], [-1.0, 0.0]])
    torch.testing.assert_close(metrics.clip_score(x, y), torch.tensor([96.0, 0.0], dtype=torch.float64))
