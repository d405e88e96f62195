"""Makes `digits.parquet` from the digits that scikit-learn carries. Same libraries, same bytes.

    python data/make_digits.py [path]

The file is an ordinary `datasets` parquet: an `image` column (PNG bytes and a file name) and a `label` column.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

DIGITS_PATH = Path(__file__).parent / "digits.parquet"
BRIGHTEST = 16  # the pixels count the "on" cells of a 4x4 block of the scanned bitmap

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": [str(digit) for digit in range(10)], "_type": "ClassLabel"},
}
SCHEMA = pa.schema(
    [
        pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
        pa.field("label", pa.int64()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


def digits_as_uint8() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 in [0, 255], (1797, 8, 8), and their labels, int64, (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.rint(digits.images * (255 / BRIGHTEST)).astype(np.uint8), digits.target.astype(np.int64)


def encode_png(image: np.ndarray) -> bytes:
    """Encodes one gray image, uncompressed: then no version of zlib shows in the bytes, and the parquet compresses."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def digits_table() -> pa.Table:
    """Returns the whole data set as one table."""
    images, labels = digits_as_uint8()
    rows = [{"bytes": encode_png(image), "path": f"{index:04d}.png"} for index, image in enumerate(images)]
    return pa.table({"image": rows, "label": labels}, schema=SCHEMA)


def write_digits(path: Path) -> None:
    """Writes the data set to `path`."""
    pq.write_table(digits_table(), path, compression="zstd", compression_level=19)


if __name__ == "__main__":
    destination = Path(sys.argv[1]) if len(sys.argv) > 1 else DIGITS_PATH
    write_digits(destination)
    print(f"{destination}: {destination.stat().st_size} bytes")
