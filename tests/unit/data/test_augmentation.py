"""The augmentation computes what the code of Karras et al. 2022 computes, for each image alone."""

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.config import AugmentationTransform, ConfigError, DataConfig
from ddpm_hf.data import Augmentation
from ddpm_hf.data import augmentation as augmentation_module
from ddpm_hf.data.augmentation import SYM6, parameters_of, transform

ALL: list[AugmentationTransform] = [
    "xflip", "yflip", "rotate_int", "translate_int", "scale", "rotate_frac", "aniso", "translate_frac", "brightness",
    "contrast", "lumaflip", "hue", "saturation",
]  # fmt: skip

# Computed by training/augment.py of NVlabs/edm at commit 0a2ff34, with these values in the place of random ones.
GEOMETRY: dict[str, Any] = {
    "xflip": [1.0],
    "yflip": [1.0],
    "rotate_int": [3.0],
    "translate_int": [[0.9, -0.7]],
    "scale": [2.5],
    "rotate_frac": [-2.0],
    "aniso": [[-1.1, 0.6]],
    "translate_frac": [[0.25, -0.5]],
}
GEOMETRY_PARAMETERS = [1, 1, 0, 1, 1.3333, -1.3333, 2.5, -1.4161, -0.9093, -0.9079, -0.6211, 0.25, -0.5]
GEOMETRY_IMAGE = [
    [0.8356, 0.8140, 0.3608, 0.3461, -0.0597, 0.4233],
    [0.3498, -0.5440, -0.6540, -0.6366, -0.0826, -0.8484],
    [-0.2716, -0.5085, 0.6304, -0.3476, 0.3530, -0.2180],
    [0.8113, 0.7741, 0.6769, -0.6161, 0.0173, 0.9721],
    [0.9840, 0.6615, -0.3353, -1.2835, -0.2007, 0.7796],
    [1.2361, 0.7095, 0.4658, -0.4693, -0.6538, -0.4918],
]
COLOR: dict[str, Any] = {
    "brightness": [0.7],
    "contrast": [-0.9],
    "lumaflip": [1.0],
    "hue": [1.3],
    "saturation": [-0.4],
}
COLOR_PARAMETERS = [0.7, -0.9, 1, -0.7325, 0.96356, -0.4]


def arrays(values: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in values.items()}


def augmentation_of(
    shape: tuple[int, int, int] = (3, 8, 8), probability: float = 0.5, names: list[AugmentationTransform] = ALL
) -> Augmentation:
    return Augmentation(DataConfig(augmentation=probability, augmentation_transforms=names), shape, seed=0)


def test_geometric_transforms_are_those_of_the_authors_code() -> None:
    image = torch.cos(torch.arange(36.0) ** 2 / 9).reshape(1, 1, 6, 6)
    found = transform(image, arrays(GEOMETRY))[0, 0]
    torch.testing.assert_close(found, torch.tensor(GEOMETRY_IMAGE), rtol=0, atol=1e-4)
    assert np.allclose(parameters_of(arrays(GEOMETRY), 6, 6), [GEOMETRY_PARAMETERS], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (
            [[0.5, -1.0], [-0.25, 0.75], [0.0, -0.5]],
            [[-0.0245, -0.41657], [-0.05864, 0.07461], [-0.40733, 0.58353]],
        ),
        ([[0.5, -1.0]], [[-0.4685, 0.6296]]),
    ],
    ids=["RGB", "gray"],
)
def test_color_transforms_are_those_of_the_authors_code(pixels: list[Any], expected: list[Any]) -> None:
    found = transform(torch.tensor(pixels)[None, :, None], arrays(COLOR))[0, :, 0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)
    assert np.allclose(parameters_of(arrays(COLOR), 1, 2), [COLOR_PARAMETERS], rtol=0, atol=1e-4)


def test_the_filter_is_orthogonal_so_whole_pixels_move_exactly_and_are_reflected_at_the_border() -> None:
    """On images that are not square, by more pixels than they have."""
    shifted = [sum(a * b for a, b in zip(SYM6, SYM6[2 * k :], strict=False)) for k in range(6)]
    assert np.allclose(shifted, [1, 0, 0, 0, 0, 0])
    image = torch.arange(15.0).reshape(1, 1, 3, 5) / 15
    x, y = 7, -4
    values = arrays({"translate_frac": [[x / (0.125 * 5), y / (0.125 * 3)]]})
    found = transform(image, values)[0, 0]
    columns = [abs((column - x + 4) % 8 - 4) for column in range(5)]
    rows = [abs((row - y + 2) % 4 - 2) for row in range(3)]
    torch.testing.assert_close(found, image[0, 0][rows][:, columns], rtol=0, atol=1e-5)


def test_the_parameters_of_a_sample_are_on_record() -> None:
    """Every run with this augmentation repeats them."""
    _, parameters = augmentation_of(probability=1)(torch.zeros(1, 3, 8, 8), 1000)
    expected = [
        1, 1, 1, 1, 0, -1, -0.4893, -0.7907, 0.9779, 0.06691,
        0, 0.498, 0.2321, 0.2993, 0.07525, 0, -1.971, -0.2395, 0.195,
    ]  # fmt: skip
    torch.testing.assert_close(parameters, torch.tensor([expected]), rtol=1e-3, atol=0)


def test_an_image_is_a_function_of_the_seed_and_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever the batch is and however many images are resampled at once."""
    images = torch.rand(70, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    augmentation = augmentation_of()
    whole, parameters = augmentation(images, 20)
    monkeypatch.setattr(augmentation_module, "_MAX_RESAMPLED_VALUES", 20_000)
    for start, stop in ((0, 1), (1, 30), (30, 70)):
        part, part_parameters = augmentation(images[start:stop], 20 + start)
        assert torch.equal(part, whole[start:stop])
        assert torch.equal(part_parameters, parameters[start:stop])


def test_images_without_a_transform_have_parameters_of_0_and_stay_as_they_are() -> None:
    images = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, parameters = augmentation_of(probability=0.1)(images, 0)
    assert parameters.shape == (200, 19)
    is_unchanged = (parameters == 0).all(dim=1)
    assert 0 < is_unchanged.sum() < 200
    assert torch.equal(is_unchanged, (found == images).flatten(1).all(dim=1))


def test_each_transform_has_the_probability_and_the_distribution_of_the_paper() -> None:
    values = augmentation_of(probability=0.12).draw(0, 20_000)
    rates = {name: float((w.reshape(len(w), -1) != 0).any(axis=1).mean()) for name, w in values.items()}
    expected = dict.fromkeys(ALL, 0.12) | {"xflip": 0.5, "yflip": 0.06, "lumaflip": 0.06, "rotate_int": 0.09}
    assert rates == pytest.approx(expected, abs=0.01)
    for name in ("scale", "translate_frac", "brightness", "contrast", "saturation"):
        assert values[name][values[name] != 0].std() == pytest.approx(1, abs=0.04)
    for name, limit in (("rotate_frac", math.pi), ("hue", math.pi), ("translate_int", 1)):
        assert values[name][values[name] != 0].std() == pytest.approx(limit / math.sqrt(3), rel=0.04)
    is_stretched = values["aniso"][:, 0] != 0
    assert (values["aniso"][is_stretched, 1] == 0).mean() == pytest.approx(0.5, abs=0.03)


def test_the_host_reads_nothing_from_the_device() -> None:
    names = set()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Operations():
        augmentation_of()(torch.zeros(8, 3, 8, 8), 0)
    assert names & {"gather", "index_copy"}
    assert not names & {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((3, 8, 12), ["rotate_int"], r"rotate_int needs square images, but these are 8x12; remove it\."),
        ((4, 8, 8), ["hue", "scale"], r"hue needs gray or RGB images, but these have 4 channels; remove it, or set "),
    ],
)
def test_a_transform_that_does_not_fit_the_images_is_refused(
    shape: tuple[int, int, int], names: list[AugmentationTransform], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        augmentation_of(shape, names=names)


def test_a_transform_without_effect_on_gray_images_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        augmentation_of((1, 8, 8), names=["scale", "hue"])
    assert caplog.messages == ["data.augmentation_transforms hue has no effect on gray images."]
