"""Makes `emoji_16.parquet` from Noto Color Emoji and the list of emoji of Unicode.

    python data/make_emoji.py [path] [--font NotoColorEmoji.ttf] [--list emoji-test.txt]

On Debian and Ubuntu, the packages fonts-noto-color-emoji and unicode-data have both files at the default paths.

The file is an ordinary `datasets` parquet: an `image` column (PNG bytes and a file name), a `label` column (group of
the emoji) and a `name` column. Skin tones are left out: they would be half of the images.
"""

import argparse
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont, features

EMOJI_PATH = Path(__file__).parent / "emoji_16.parquet"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")

GROUPS = [
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
    "Symbols", "Travel & Places",
]  # fmt: skip
FONT_SIZE = 109  # the only size of the bitmaps in the font
GLYPH_SIZE = (136, 128)
SKIN_TONES = range(0x1F3FB, 0x1F400)
RESOLUTION = 16

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": GROUPS, "_type": "ClassLabel"},
    "name": {"dtype": "string", "_type": "Value"},
}
SCHEMA = pa.schema(
    [
        pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
        pa.field("label", pa.int64()),
        pa.field("name", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


def emoji_of(text: str) -> Iterator[tuple[str, str, str]]:
    """Yields characters, name and group of every emoji without a skin tone in the text of emoji-test.txt."""
    group = ""
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        entry = re.fullmatch(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)", line)
        if entry and group in GROUPS:
            codes = [int(code, 16) for code in entry[1].split()]
            if not any(code in SKIN_TONES for code in codes):
                yield "".join(map(chr, codes)), entry[2], group


def draw(characters: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Returns the emoji on a white square, or None if the font has no single glyph for it."""
    if round(font.getlength(characters)) != GLYPH_SIZE[0]:
        return None
    side = max(GLYPH_SIZE)
    image = Image.new("RGB", (side, side), "white")
    corner = tuple((side - length) // 2 for length in GLYPH_SIZE)
    left, top, *_ = font.getbbox(characters)
    ImageDraw.Draw(image).text((corner[0] - left, corner[1] - top), characters, font=font, embedded_color=True)
    return image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)


def encode_png(image: Image.Image) -> bytes:
    """Encodes an image, uncompressed: then no version of zlib shows in the bytes, and the parquet compresses."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def emoji_table(font_path: Path, list_path: Path) -> pa.Table:
    """Returns the whole data set as one table."""
    if not features.check("raqm"):
        raise SystemExit("This Pillow cannot shape text; install a Pillow wheel, which has libraqm.")
    font = ImageFont.truetype(font_path, FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    rows = []
    for characters, name, group in emoji_of(list_path.read_text(encoding="utf-8")):
        if image := draw(characters, font):
            file_name = "_".join(f"{ord(character):x}" for character in characters) + ".png"
            struct = {"bytes": encode_png(image), "path": file_name}
            rows.append({"image": struct, "label": GROUPS.index(group), "name": name})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write_emoji(path: Path, font_path: Path = FONT, list_path: Path = LIST) -> None:
    """Writes the data set to `path`."""
    pq.write_table(emoji_table(font_path, list_path), path, compression="zstd", compression_level=19)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=EMOJI_PATH)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--list", type=Path, default=LIST)
    arguments = parser.parse_args()
    write_emoji(arguments.path, arguments.font, arguments.list)
    print(f"{arguments.path}: {arguments.path.stat().st_size} bytes")
