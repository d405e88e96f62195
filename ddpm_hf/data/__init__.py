"""Images to train on: opened, decoded once, and fed in an order that is a closed form of the sample number."""

from ddpm_hf.data.decode import DataError, normalize, to_uint8
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.loader import ImageFeed, ImageStream, SampleOrder, describe_sets, open_images, open_sets
from ddpm_hf.data.summary import summarize

__all__ = [
    "DataError", "ImageFeed", "ImageSet", "ImageStream", "SampleOrder", "describe_sets", "normalize", "open_images",
    "open_sets", "summarize", "to_uint8",
]  # fmt: skip
