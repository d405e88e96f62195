"""Apply the editing methods to real digits: a table of encoding errors and a picture, for docs/sampling.md.

python benchmarks/editing.py outputs/digits/pipeline --picture docs/images/editing.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset

from ddpm_hf import GaussianDiffusionPipeline
from ddpm_hf.plots import image_grid

DIGITS = Path(__file__).parents[1] / "data" / "digits.parquet"
NUM_IMAGES = 10


def main() -> None:
    """Print the table and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a pipeline trained by configs/digits_8.yaml")
    parser.add_argument("--picture", type=Path, default=Path("editing.png"))
    arguments = parser.parse_args()
    pipe = GaussianDiffusionPipeline.from_pretrained(arguments.folder)
    pipe.set_progress_bar_config(disable=True)
    digits = load_dataset("parquet", data_files=str(DIGITS), split=f"train[:{NUM_IMAGES}]")
    pixels = np.stack([np.asarray(image.convert("L")) for image in digits["image"]])[..., None]
    labels = list(digits["label"])
    print(f"{NUM_IMAGES} digits, {len(pipe.scheduler)} timesteps, torch {torch.__version__}, {pipe.device}\n")
    print_errors(pipe, pixels, labels)
    draw(pipe, pixels, labels, arguments.picture)
    print(f"\nWrote {arguments.picture}.")


def print_errors(pipe: GaussianDiffusionPipeline, pixels: np.ndarray, labels: list[int]) -> None:
    """Print the root mean squared error between images and their decoded encodings."""
    print("| spacing | steps | 1 call a step | 3 calls | 10 calls |\n|---|---|---|---|---|")
    for spacing in ("leading", "trailing"):
        for num_steps in (20, 50, 100):
            options = {"num_inference_steps": num_steps, "timestep_spacing": spacing, "class_labels": labels}
            errors = []
            for num_iterations in (1, 3, 10):
                noise = pipe.encode(pixels, num_iterations, **options)
                decoded = pipe(sample=noise, eta=0.0, output_type="np", **options).images
                errors.append(float(np.sqrt(np.mean((decoded - pixels / 255) ** 2))))
            print(f"| {spacing} | {num_steps} | {' | '.join(f'{error:.4f}' for error in errors)} |", flush=True)


def draw(pipe: GaussianDiffusionPipeline, pixels: np.ndarray, labels: list[int], path: Path) -> None:
    """Draw a row of digits and one row per edit of them."""

    def options() -> dict[str, object]:
        generator = torch.Generator().manual_seed(0)
        return {"num_inference_steps": 50, "class_labels": labels, "output_type": "uint8", "generator": generator}

    mask = np.zeros(pixels.shape[1:3], bool)
    mask[:, pixels.shape[2] // 2 :] = True
    masked = pixels.copy()
    masked[:, mask] = 128
    rows = [pixels]
    rows += [pipe.denoise_from(pixels, strength, **options()).images for strength in (0.3, 0.6, 0.9)]
    rows += [masked, pipe.inpaint(pixels, mask, num_resamples=5, jump_length=5, **options()).images]
    rows += [pipe.interpolate(pixels, np.roll(pixels, -1, 0), 0.5, eta=0.0, **options()).images]
    image_grid(np.concatenate(rows), len(pixels)).save(path)


if __name__ == "__main__":
    main()
