"""Images to train on: opened, decoded once, and fed in an order that is a closed form of the sample number."""

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.feed import ImageFeed
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.order import SampleOrder
from ddpm_hf.data.pixels import normalize, to_uint8
from ddpm_hf.data.sources import describe_sets, open_images, open_sets
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.data.summary import summarize

__all__ = [
    "DataError", "ImageFeed", "ImageSet", "ImageStream", "SampleOrder", "describe_sets", "normalize", "open_images",
    "open_sets", "summarize", "to_uint8",
]  # fmt: skip
