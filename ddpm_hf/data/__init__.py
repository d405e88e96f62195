"""Images to train on: opened, decoded once, and fed in an order that is a closed form of the sample number."""

from ddpm_hf.data.image_set import DataError, ImageSet, SampleOrder, normalize
from ddpm_hf.data.sources import open_images

__all__ = ["DataError", "ImageSet", "SampleOrder", "normalize", "open_images"]
