"""Scores in Inception features are those of torch-fidelity's own program, and so are kernel distances and neighbours.

The network has random weights, so that no file need be downloaded: what is checked is all that surrounds it. Its own
features of real weights are torch-fidelity's affair.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

torch_fidelity = pytest.importorskip("torch_fidelity")

from torch_fidelity import feature_extractor_inceptionv3 as extractor  # noqa: E402
from torch_fidelity.metric_prc import calculate_precision_recall_full  # noqa: E402

from ddpm_hf.data import ImageSet  # noqa: E402
from ddpm_hf.evaluation import features, metrics  # noqa: E402
from ddpm_hf.evaluation.metrics import Metric, measure_fidelity  # noqa: E402

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)
SAMPLES, REFERENCE = (RANDOM.integers(0, high, (40, 8, 8, 3), dtype=np.uint8) for high in (256, 200))


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
    """A file of random weights of the network."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
        network = extractor.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    # The initial spread of the layers would make all images alike in the end.
    state = {
        name: value * 2.5 if name.endswith("conv.weight") else value for name, value in network.state_dict().items()
    }
    torch.save(state, path)
    return path


@pytest.fixture
def standard(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of random weights in the place of the one that FID is defined with.

    Images are resized to 75x75 pixels, the least that the network takes, which costs a sixteenth of 299x299.
    """
    monkeypatch.setattr(extractor.FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    monkeypatch.setattr(features, "STANDARD_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    return weights


def image_set(images: np.ndarray) -> ImageSet:
    return ImageSet(images.transpose(0, 3, 1, 2), None, None, np.arange(len(images)))


def measure(folder: Path, **options: Any) -> list[Metric]:
    return measure_fidelity(SAMPLES, image_set(REFERENCE), device=CPU, cache_dir=folder, **options)


def test_scores_are_those_of_torch_fidelitys_own_program(
    standard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are the same bits in the same batches. FID needs 2049 images, so its covariance is checked elsewhere.

    The Inception Score is asked of four images a split, too few for a number that means something.
    """
    monkeypatch.setattr(metrics, "LEAST_IN_A_SPLIT", 4)
    ours = measure(tmp_path, metrics=["precision", "recall", "inception_score", "kid"], weights=standard, batch_size=20)
    assert [score.name for score in ours] == ["precision", "recall", "inception_score", "kid"]
    assert [score.num_reference for score in ours] == [40, 40, 0, 40]
    assert all("weights sha256" in score.features and "299x299" in score.features for score in ours)
    assert all(f"torch-fidelity {torch_fidelity.__version__}" in score.features for score in ours)
    options: dict[str, Any] = {
        "cuda": False, "verbose": False, "batch_size": 20, "feature_extractor": "inception-v3-compat",
        "feature_extractor_weights_path": str(standard), "cache": False, "save_cpu_ram": True,
    }  # fmt: skip
    theirs = torch_fidelity.calculate_metrics(
        input1=AsDataset(SAMPLES), input2=AsDataset(REFERENCE), **options, prc=True, isc=True, kid=True,
        kid_subset_size=4, rng_seed=metrics._numpy_seed(0),
    )  # fmt: skip
    names = ["precision", "recall", "inception_score_mean", "kernel_inception_distance_mean"]
    assert [score.value for score in ours] == pytest.approx([theirs[name] for name in names], rel=1e-5)
    assert ours[2].standard_error == pytest.approx(theirs["inception_score_std"] / 3, rel=1e-3)
    subsets_error = theirs["kernel_inception_distance_std"] / 10  # of their mean, which is a part of it
    assert ours[3].standard_error is not None
    assert ours[3].standard_error > subsets_error


def test_an_inception_score_of_few_images_is_refused(standard: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inception_score needs at least 1000 samples; there are 40 samples"):
        measure(tmp_path, metrics=["inception_score"], weights=standard)


def test_fid_needs_more_images_than_features(standard: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fid needs at least 2049 images on each side, .* \(2048\); there are 40"):
        measure(tmp_path, metrics=["fid"], weights=standard)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fid_is_that_of_torch_fidelity(standard: Path, tmp_path: Path) -> None:
    """torch-fidelity takes means in float32 and roots of a product that is not symmetric: four digits."""
    samples, reference = (RANDOM.integers(0, high, (2100, 8, 8, 3), dtype=np.uint8) for high in (256, 200))
    (score,) = measure_fidelity(
        samples, image_set(reference), metrics=["fid"], weights=standard, device=CPU, cache_dir=tmp_path
    )
    theirs = torch_fidelity.calculate_metrics(
        input1=AsDataset(samples), input2=AsDataset(reference), fid=True, cuda=False, verbose=False, cache=False,
        feature_extractor_weights_path=str(standard), save_cpu_ram=True,
    )  # fmt: skip
    assert (score.name, score.num_samples, score.num_reference) == ("fid", 2100, 2100)
    assert score.value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_another_file_than_the_standard_weights_is_refused(weights: Path, tmp_path: Path) -> None:
    """It is not even opened: torch-fidelity unpickles, which may run what a file holds."""
    with pytest.raises(
        ValueError, match=r"random.pth has the sha256 .* FID begins with 6726825d0af5; get it from http"
    ):
        measure(tmp_path, weights=weights)
    with pytest.raises(ValueError, match=r"no-such\.pth is no file; give the path of weights-inception-2015-12-05"):
        measure(tmp_path, weights=tmp_path / "no-such.pth")


def test_weights_that_cannot_be_had_are_named_with_the_way_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (tmp_path / "nowhere" / Path(extractor.URL_INCEPTION_V3).name).as_uri()
    monkeypatch.setattr(extractor, "URL_INCEPTION_V3", url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(ValueError, match=r"cannot be downloaded .*; get them from file:.* give their path as weights"):
        measure(tmp_path)


def test_weights_are_downloaded_once_and_only_if_they_are_the_right_ones(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extractor, "URL_INCEPTION_V3", weights.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(ValueError, match=r"cannot be downloaded .*invalid hash value"):
        features.open_inception(None, CPU)
    monkeypatch.setattr(features, "STANDARD_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    network = features.open_inception(None, CPU)
    monkeypatch.setattr(extractor, "URL_INCEPTION_V3", (tmp_path / weights.name).as_uri())
    assert features.open_inception(None, CPU).digest == network.digest


class Noise(torch.nn.Module):
    """Three features of an image, its pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[..., 0, 0].float() / 64 - 2


def noise_scores(folder: Path, seed: int, shift: int, metrics: list[str]) -> list[Metric]:
    random = np.random.default_rng(seed)
    samples, reference = (random.integers(low, low + 190, (600, 1, 1, 3), dtype=np.uint8) for low in (shift, 0))
    features = f"{__name__}:Noise"
    return measure_fidelity(samples, image_set(reference), metrics=metrics, features=features, device=CPU,
                            cache_dir=folder)  # fmt: skip


@pytest.mark.parametrize("shift", [0, 30])
def test_the_error_of_a_kernel_distance_is_its_spread_over_data_sets(tmp_path: Path, shift: int) -> None:
    """60 data sets tell their spread to 9 %, three of which are allowed; samples may be as real images, or not."""
    scores = [noise_scores(tmp_path, seed, shift, ["kernel_distance"])[0] for seed in range(60)]
    told = float(np.mean([score.standard_error or np.nan for score in scores]))
    assert told == pytest.approx(float(np.std([score.value for score in scores], ddof=1)), rel=0.3)
    assert scores[0].name == f"kernel_distance[{__name__}:Noise]"


def test_precision_and_recall_do_not_depend_on_the_mean_of_the_features() -> None:
    """Whole 256ths, so that 300 more is exact; of 300 samples one may be at the edge."""
    samples, reference = ((RANDOM.normal(0, width, (300, 8)) * 256).round() / 256 for width in (0.9, 1))
    plain, far = (
        metrics._precision_and_recall((samples + mean).astype(np.float32), (reference + mean).astype(np.float32), CPU)
        for mean in (0, 300)
    )
    for name in ("precision", "recall"):
        assert far[name][0] == pytest.approx(plain[name][0], abs=1.01 / 300)


def test_precision_is_of_the_samples_and_recall_of_the_reference(tmp_path: Path) -> None:
    """Samples from a part of the reference are all real, but do not reach the rest of it."""
    random = np.random.default_rng(0)
    reference = random.integers(0, 256, (300, 1, 1, 3), dtype=np.uint8)
    samples = random.integers(96, 160, (300, 1, 1, 3), dtype=np.uint8)
    scores = measure_fidelity(
        samples, image_set(reference), metrics=["precision", "recall"], features=f"{__name__}:Noise", device=CPU,
        cache_dir=tmp_path,
    )  # fmt: skip
    both = [torch.from_numpy(images[:, 0, 0]).float() for images in (samples, reference)]
    assert [score.value for score in scores] == pytest.approx(calculate_precision_recall_full(*both, 3))
    assert scores[0].value > 0.9
    assert scores[1].value < 0.2
    assert scores[0].name == f"precision[{__name__}:Noise]"
