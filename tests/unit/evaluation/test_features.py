"""Networks for features by name: what is opened is what was named, preprocessed as its publisher says."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BertConfig, BertModel, BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from ddpm_hf.evaluation.features import FeatureNetwork, digest_of, open_features

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 20, 20), dtype=np.uint8)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def save(folder: Path, model: nn.Module, *, crop: int = 28) -> str:
    """Saves a model with the settings of an image processor, and returns the folder."""
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
    """The same by hand: bicubic to 28 pixels as Stein et al. do, and normalised; then the model alone. To float32.

    Under the other name it is as its publisher says: bicubic to 32 pixels, 28 from the centre.
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
    """transformers fills a pooler that a checkpoint lacks with random numbers, other ones each time."""
    folder = save(tmp_path / "vit", ViTModel(ViTConfig(**SMALL), add_pooling_layer=False).eval())
    first, second = (features_in(open_features(f"transformers:{folder}", None, CPU)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


class Channels(nn.Module):
    """Mean and spread of each channel, scaled by a weight."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        pixels = images.float() * self.scale
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], dim=1)


class Broken(nn.Module):
    """Returns what its argument says."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: torch.Tensor) -> object:
        return self.output


def twice() -> nn.Module:
    return Channels(2.0)


def no_module() -> int:
    return 3


def test_a_module_by_import_path_is_called_with_rgb_bytes() -> None:
    network = open_features(f"{__name__}:twice", None, CPU)
    np.testing.assert_allclose(features_in(network)[:, :3], 2 * IMAGES.mean((2, 3)), rtol=1e-5)
    gray = IMAGES[:, :1]
    np.testing.assert_array_equal(features_in(network, gray), features_in(network, np.repeat(gray, 3, axis=1)))
    assert network.name == f"{__name__}:twice"
    assert network.digest != open_features(f"{__name__}:Channels", None, CPU).digest
    assert not next(network.module.parameters()).requires_grad


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.zeros(2, 3, 1), r"returned \[2, 3, 1\] for 2 images; it must return a tensor \[2, features\]"),
        (torch.zeros(3, 2), r"returned \[3, 2\]"),
        ({"features": 1}, "returned dict"),
        (torch.tensor([[1.0], [np.nan]]), "1 of the 2 images of the images from number 0 .* the first is number 1"),
    ],
)
def test_features_that_are_none_are_refused(output: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        features_in(FeatureNetwork("mine", "", "", Broken(output), CPU), IMAGES[:2])


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ("incepton", "features incepton is not known; .* Did you mean inception?"),
        ("dinov2", "Did you mean dinov2?"),
        ("dino:facebook/dinov2-base", "Did you mean dinov2?"),
        ("", "is not known"),
        ("dinov2:no-such-folder/model", r"cannot be opened \(.*\); give a folder or an id on the Hub"),
        ("no_such_package.of_mine:network", "cannot be imported .*no_such_package"),
        (f"{__name__}:no_such_name", "cannot be imported .*no_such_name"),
        (f"{__name__}:no_module", "must be a callable that returns a torch.nn.Module"),
        (f"{__name__}:IMAGES", "must be a callable that returns a torch.nn.Module"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(features: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        open_features(features, None, CPU)
    assert "\n" not in str(caught.value)


def test_models_that_do_not_fit_their_name_are_refused(
    dinov2: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    vit = save(tmp_path / "vit", ViTModel(ViTConfig(**SMALL)).eval())
    with pytest.raises(ValueError, match=f"is a model of type vit; say transformers:{vit}"):
        open_features(f"dinov2:{vit}", None, CPU)
    words = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    text = save(tmp_path / "text", BertModel(BertConfig(vocab_size=16, **words)))
    with pytest.raises(ValueError, match="BertModel is no model of images alone"):
        open_features(f"transformers:{text}", None, CPU)
    with pytest.raises(ValueError, match=r"weights w\.pth is for features inception"):
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
