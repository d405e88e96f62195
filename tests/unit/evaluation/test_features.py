"""Feature networks are opened by name and preprocess as published; reference statistics are computed once."""

import hashlib
import importlib.util
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BertConfig, BertModel, BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from ddpm_hf.data import ImageSet
from ddpm_hf.evaluation import features as features_module
from ddpm_hf.evaluation.features import FeatureNetwork, ReferenceStatistics, digest_of, moments_of, open_features
from tests.feature_networks import ChannelStatistics, random_inception_weights

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 20, 20), dtype=np.uint8)
STATISTICS, DOUBLED = "tests.feature_networks:ChannelStatistics", "tests.feature_networks:doubled_statistics"
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def save(folder: Path, model: nn.Module, *, crop: int = 28) -> str:
    """Save a model with the settings of an image processor, and return the folder."""
    model.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": crop, "width": crop}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return str(folder)


def features_in(network: FeatureNetwork, images: np.ndarray = IMAGES) -> np.ndarray:
    return network.features_of(len(images), lambda rows: images[rows.start : rows.stop], 2, "images")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("dinov2"), Dinov2Model(Dinov2Config(**SMALL)).eval())


@pytest.mark.parametrize(("kind", "side", "border"), [("dinov2", 28, 0), ("transformers", 32, 2)])
def test_dinov2_features_are_the_class_token_of_the_whole_image(dinov2: str, kind: str, side: int, border: int) -> None:
    """Equal to bicubic resizing to 28 pixels as in Stein et al., normalization, and the model alone.

    With `transformers:` the preprocessing is as published: bicubic to 32 pixels, 28 from the center.
    """
    network = open_features(f"{kind}:{dinov2}", None, CPU)
    size, kept = (side, side), slice(border, side - border)
    resized = [Image.fromarray(image.transpose(1, 2, 0)).resize(size, Image.Resampling.BICUBIC) for image in IMAGES]
    pixels = np.stack([np.asarray(image)[kept, kept] for image in resized]) / 255
    inputs = torch.tensor((pixels - MEAN) / STD, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2).eval()(inputs).last_hidden_state[:, 0]
    # A processor of torchvision resizes without PIL and may differ by a level in a few pixels.
    is_pil = "Pil" in network.description
    np.testing.assert_allclose(features_in(network), expected, atol=1e-5 if is_pil else 5e-2)
    assert network.name == f"{kind}:{dinov2}"
    assert not network.module.training


def test_the_description_names_model_weights_resize_and_versions(dinov2: str) -> None:
    description = open_features(f"dinov2:{dinov2}", None, CPU).description
    for words in (f"Dinov2Model {dinov2}", "weights sha256 ", "size {'height': 28, 'width': 28}", "transformers 5",
                  f"torch {torch.__version__}"):  # fmt: skip
        assert words in description
    assert "crop_size" not in description
    as_published = open_features(f"transformers:{dinov2}", None, CPU).description
    assert "size {'shortest_edge': 32}, crop_size {'height': 28, 'width': 28}" in as_published


def test_the_digest_tells_other_weights_and_another_resize(dinov2: str, tmp_path: Path) -> None:
    ours = open_features(f"dinov2:{dinov2}", None, CPU).digest
    model = Dinov2Model.from_pretrained(dinov2)
    same = save(tmp_path / "same", model)
    cropped = save(tmp_path / "cropped", model, crop=24)
    with torch.no_grad():
        model.layernorm.bias[0] += 1e-3
    changed = save(tmp_path / "changed", model)
    digests = [open_features(f"dinov2:{folder}", None, CPU).digest for folder in (same, cropped, changed)]
    assert digests[0] == ours  # wherever the model lies
    assert len({ours, *digests[1:]}) == 3


def test_a_vision_model_without_pooler_weights_gives_its_class_token(tmp_path: Path) -> None:
    """transformers initializes a pooler that a checkpoint lacks at random, differently each time."""
    folder = save(tmp_path / "vit", ViTModel(ViTConfig(**SMALL), add_pooling_layer=False).eval())
    first, second = (features_in(open_features(f"transformers:{folder}", None, CPU)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


class Broken(nn.Module):
    """Return a fixed output."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: torch.Tensor) -> object:
        return self.output


def no_module() -> int:
    return 3


def test_a_module_by_import_path_is_called_with_rgb_bytes() -> None:
    network = open_features(DOUBLED, None, CPU)
    np.testing.assert_allclose(features_in(network)[:, :3], 2 / 255 * IMAGES.mean((2, 3)), rtol=1e-5)
    gray = IMAGES[:, :1]
    np.testing.assert_array_equal(features_in(network, gray), features_in(network, np.repeat(gray, 3, axis=1)))
    assert network.name == DOUBLED
    assert network.digest != open_features(STATISTICS, None, CPU).digest
    assert network.num_features((3, 20, 20)) == 6


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.zeros(2, 3, 1), r"returned \[2, 3, 1\] for 2 images; it must return a tensor \[2, features\]"),
        (torch.zeros(3, 2), r"returned \[3, 2\]"),
        ({"features": 1}, "returned dict"),
        (
            torch.tensor([[1.0], [np.nan]]),
            "not finite for 1 of the 2 images of the images from number 0 .* the first of them is number 1",
        ),
    ],
)
def test_invalid_features_are_refused(output: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        features_in(FeatureNetwork("mine", "", "", Broken(output), CPU), IMAGES[:2])


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ("incepton", "features incepton is not known; .* Did you mean inception?"),
        ("dinov2", "Did you mean dinov2?"),
        ("dino:facebook/dinov2-base", "Did you mean dinov2?"),
        ("", "is not known"),
        ("dinov2:no-such-folder/model", r"cannot be opened \(.*\); give a folder or a Hub id"),
        ("no_such_package.of_mine:network", "cannot be imported .*no_such_package"),
        (f"{__name__}:no_such_name", "cannot be imported .*no_such_name"),
        (f"{__name__}:no_module", "must be a callable that returns a torch.nn.Module"),
        (f"{__name__}:IMAGES", "must be a callable that returns a torch.nn.Module"),
    ],
)
def test_an_unknown_name_is_refused(features: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        open_features(features, None, CPU)
    assert "\n" not in str(caught.value)


def test_models_that_do_not_fit_their_name_are_refused(
    dinov2: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    vit = save(tmp_path / "vit", ViTModel(ViTConfig(**SMALL)).eval())
    with pytest.raises(ValueError, match=f"is a model of type vit; use transformers:{vit}"):
        open_features(f"dinov2:{vit}", None, CPU)
    words = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    text = save(tmp_path / "text", BertModel(BertConfig(vocab_size=16, **words)))
    with pytest.raises(ValueError, match="BertModel is not an image model"):
        open_features(f"transformers:{text}", None, CPU)
    with pytest.raises(ValueError, match=r"weights w\.pth applies to features inception only"):
        open_features(f"dinov2:{dinov2}", Path("w.pth"), CPU)


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model = ViTModel(ViTConfig(**SMALL)).eval()
    folder = save(tmp_path / "vit", model)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("layernorm.")}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(ValueError, match=r"its own network: layernorm\.bias, layernorm\.weight"):
        open_features(f"transformers:{folder}", None, CPU)


def test_digests_tell_names_and_values() -> None:
    one = digest_of({"a": torch.zeros(2), "b": "x"})
    assert one == digest_of({"b": "x", "a": np.zeros(2, np.float32)})
    others = [{"a": torch.zeros(2), "c": "x"}, {"a": torch.zeros(3), "b": "x"}, {"a": torch.ones(2), "b": "x"}]
    assert one not in {digest_of(other) for other in others}


# Inception


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    return random_inception_weights(tmp_path_factory.mktemp("weights"))


def test_another_file_than_the_standard_weights_is_refused(inception_weights: Path, tmp_path: Path) -> None:
    """It is not even opened: torch-fidelity unpickles, which may run what a file holds."""
    with pytest.raises(
        ValueError, match=r"random.pth has the sha256 .* FID begins with 6726825d0af5; get it from http"
    ):
        open_features("inception", inception_weights, CPU)
    with pytest.raises(ValueError, match=r"no-such\.pth is not a file; give the path of weights-inception-2015-12-05"):
        open_features("inception", tmp_path / "no-such.pth", CPU)


def test_weights_are_downloaded_once_and_only_if_they_are_the_right_ones(
    inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as extractor

    missing = (tmp_path / "nowhere" / Path(extractor.URL_INCEPTION_V3).name).as_uri()
    monkeypatch.setattr(extractor, "URL_INCEPTION_V3", missing)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(ValueError, match=r"cannot be downloaded .*; download them from file:.* their path as weights"):
        open_features("inception", None, CPU)
    monkeypatch.setattr(extractor, "URL_INCEPTION_V3", inception_weights.as_uri())
    with pytest.raises(ValueError, match=r"cannot be downloaded .*invalid hash value"):
        open_features("inception", None, CPU)
    sha256 = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", sha256)
    network = open_features("inception", None, CPU)
    monkeypatch.setattr(extractor, "URL_INCEPTION_V3", (tmp_path / inception_weights.name).as_uri())
    assert open_features("inception", None, CPU).digest == network.digest


# Moments and reference statistics


def test_moments_are_those_of_numpy_in_float64_for_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 features far from 0, where sums in float32 or of squares lose all digits of the covariance."""
    random = np.random.default_rng(4)
    values = (random.normal(size=(1000, 5)) @ random.normal(size=(5, 5)) + 3e4).astype(np.float32)
    whole = moments_of(values)
    np.testing.assert_allclose(whole.mean, values.astype(np.float64).mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(whole.covariance, np.cov(values.astype(np.float64), rowvar=False), rtol=1e-11)
    monkeypatch.setattr(features_module, "_FEATURES_CHUNK", 7)
    np.testing.assert_allclose(moments_of(values).covariance, whole.covariance, rtol=1e-11)
    assert whole.num_images == 1000


def test_a_covariance_of_too_few_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"A covariance of 8 features needs more than 8 images; there are 8\."):
        moments_of(np.zeros((8, 8)))


REFERENCE = ImageSet(IMAGES[[0, 1, 2, 3, 4] * 3], None, None, np.arange(15))


def statistics(folder: Path, images: ImageSet = REFERENCE, features: str = STATISTICS) -> ReferenceStatistics:
    return ReferenceStatistics(open_features(features, None, CPU), images, 4, folder)


@pytest.fixture
def counter() -> type[ChannelStatistics]:
    ChannelStatistics.num_images = 0
    return ChannelStatistics


def test_the_features_of_the_reference_are_computed_once(tmp_path: Path, counter: type[ChannelStatistics]) -> None:
    """Also for the moments, and from the center of the images, in the order of the set."""
    cropped = replace(REFERENCE, indices=np.arange(1, 15)[::-1], crop_size=(8, 16))
    first = statistics(tmp_path, cropped)
    features, moments = first.features(), first.moments()
    assert counter.num_images == 14
    expected = REFERENCE.images[1:][::-1, :, 6:14, 2:18] / 255
    np.testing.assert_allclose(features[:, :3], expected.mean((2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(moments.covariance, moments_of(features).covariance)
    again = statistics(tmp_path, cropped)
    np.testing.assert_array_equal(again.features(), features)
    np.testing.assert_array_equal(again.moments().covariance, moments.covariance)
    assert counter.num_images == 14


@pytest.mark.parametrize("change", ["pixel", "crop", "weights", "number"])
def test_statistics_of_another_reference_or_network_are_not_used(
    tmp_path: Path, counter: type[ChannelStatistics], change: str
) -> None:
    statistics(tmp_path).moments()
    counter.num_images = 0
    pixels = REFERENCE.images.copy()
    pixels[7, 1, 3, 3] ^= 1
    padded = np.pad(REFERENCE.images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    images = {
        "pixel": replace(REFERENCE, images=pixels),
        "crop": replace(REFERENCE, images=np.roll(padded, 1, axis=2), crop_size=(20, 20)),
        "weights": REFERENCE,
        "number": replace(REFERENCE, indices=np.arange(14)),
    }[change]
    statistics(tmp_path, images, DOUBLED if change == "weights" else STATISTICS).moments()
    assert counter.num_images == len(images)


@pytest.mark.parametrize("damage", ["a flipped bit", "a truncated file", "an empty file", "a file of something else"])
def test_damaged_statistics_are_reported_and_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, counter: type[ChannelStatistics], damage: str
) -> None:
    expected = statistics(tmp_path).moments().covariance
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    changed = {
        "a flipped bit": data,
        "a truncated file": data[:-9],
        "an empty file": b"",
        "a file of something else": b"x" * 99,
    }
    file.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(statistics(tmp_path).moments().covariance, expected)
    assert f"The reference statistics in {file} are damaged" in caplog.text
    counter.num_images = 0
    np.testing.assert_array_equal(statistics(tmp_path).moments().covariance, expected)
    assert counter.num_images == 0, "the file is whole again"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        moments = statistics(tmp_path / "file" / "cache").moments()
    np.testing.assert_array_equal(moments.mean, statistics(tmp_path).moments().mean)
    assert "cannot be cached in" in caplog.text
