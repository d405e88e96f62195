"""Image files in folders, zips and tars: the same images and labels, whichever they lie in."""

import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from ddpm_hf.data.sources import Source, open_folder, open_tar, open_zip
from tests.unit.data.helpers import RGB, encode, open_source, pixels_of, refusal, write_files, write_parquet

PETS = {"cat/1.png": 0, "cat/2.PNG": 1, "cat/deep/er.jpg": 2, "dog/1.png": 3}
IMAGES = {name: np.full((4, 3, 3), 60 * number, np.uint8) for name, number in PETS.items()}
FILES = {name: encode(image) for name, image in IMAGES.items()}


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """Writes a zip, or a tar in the compression that the name says, in the order in which files are given."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    compression = path.suffix[1:].replace("tar", "").replace("tgz", "gz")
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def store(tmp_path: Path, name: str, files: dict[str, bytes]) -> Path:
    """Writes files to a folder or an archive of that name."""
    return pack(tmp_path / name, files) if "." in name else write_files(tmp_path / name, files)


KINDS = ["pets", "pets.zip", "pets.tar", "pets.tar.gz", "pets.tgz", "pets.tar.bz2", "pets.tar.xz"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("root", ["", "./", "pets/", "a/b/pets/"])
def test_class_folders_are_labels_wherever_they_are_packed(tmp_path: Path, name: str, root: str) -> None:
    if "." not in name and root:
        pytest.skip("only archives have folders around everything")
    path = store(tmp_path, name, {root + file: data for file, data in FILES.items()})
    images = open_source(path, tmp_path / "cache", with_labels=True)
    assert images.class_names == ("cat", "dog")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1]
    assert np.array_equal(pixels_of(images), list(IMAGES.values()))


@pytest.mark.parametrize("name", KINDS[:3])
def test_a_flat_archive_has_no_labels(tmp_path: Path, name: str) -> None:
    path = store(tmp_path, name, {"1.png": FILES["cat/1.png"], "2.png": FILES["dog/1.png"]})
    assert open_source(path, tmp_path / "cache").labels is None
    if "." in name:
        packed = store(tmp_path, f"all{name}", {"images/1.png": FILES["cat/1.png"], "images/2.png": FILES["dog/1.png"]})
        assert open_source(packed, tmp_path / "cache").labels is None


def test_the_order_of_a_zip_does_not_depend_on_how_it_was_packed(tmp_path: Path) -> None:
    shuffled = {name: FILES[name] for name in ("dog/1.png", "cat/2.PNG", "cat/deep/er.jpg", "cat/1.png")}
    images = open_source(pack(tmp_path / "x.zip", shuffled), tmp_path / "cache", with_labels=True)
    assert np.array_equal(pixels_of(images), list(IMAGES.values()))


def test_a_tar_keeps_its_order_since_it_can_only_be_read_from_front_to_back(tmp_path: Path) -> None:
    turned = dict(reversed(FILES.items()))
    images = open_source(pack(tmp_path / "x.tar.gz", turned), tmp_path / "cache", with_labels=True)
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0, 0, 0]
    assert np.array_equal(pixels_of(images), list(IMAGES.values())[::-1])


@pytest.mark.parametrize("name", KINDS[:3])
def test_files_that_systems_leave_behind_are_no_images(tmp_path: Path, name: str) -> None:
    rubbish = {"__MACOSX/cat/._1.png": b"x", "cat/.DS_Store": b"x", ".git/a.png": b"x", "cat/Thumbs.db": b"x"}
    path = store(tmp_path, name, FILES | rubbish)
    images = open_source(path, tmp_path / "cache", with_labels=True)
    assert len(images) == 4
    assert images.class_names == ("cat", "dog")


def source_of(path: Path, split: str = "train") -> Source:
    opens = open_folder if path.is_dir() else open_zip if path.suffix == ".zip" else open_tar
    return opens(path, split)


@pytest.mark.parametrize("name", KINDS[:3])
def test_other_files_are_left_out_and_named(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = store(tmp_path, name, FILES | {"cat/photo.heic": b"x", "README.md": b"x"})
    assert set(source_of(path).left_out) == {"cat/photo.heic", "README.md"}
    open_source(path, tmp_path / "cache")
    assert f"2 files in {path} are left out, being no images by their names, hidden or links" in caplog.text


@pytest.mark.parametrize("name", KINDS[:3])
def test_images_that_are_passed_over_are_named(tmp_path: Path, name: str) -> None:
    """Hidden ones, and those that would be unpacked elsewhere; a class may be called __background__."""
    files = FILES | {"__background__/1.png": b"1", ".dog/1.png": b"2", "cat/.3.png": b"3"}
    outside = {"../up/1.png": b"4"} if "." in name else {}
    source = source_of(store(tmp_path, name, files | outside))
    assert source.class_names == ("__background__", "cat", "dog")
    told = {f"{file} (outside of the archive)" for file in outside}
    assert set(source.left_out) == {".dog/1.png (hidden)", "cat/.3.png (hidden)"} | told


@pytest.mark.parametrize("name", KINDS[:3])
def test_folders_named_after_splits_are_splits(tmp_path: Path, name: str) -> None:
    """Not classes; and the classes are the same ones in each, even where one split lacks some."""
    files = {"train/cat/1.png": b"1", "train/dog/1.png": b"2", "train/dog/2.png": b"3", "val/dog/1.png": b"4"}
    path = store(tmp_path, name, {f"pets/{file}" if "." in name else file: data for file, data in files.items()})
    training, held_out = source_of(path), source_of(path, "validation")
    assert [training.num_images, training.class_names] == [3, ("cat", "dog")]
    assert [held_out.num_images, held_out.class_names] == [1, ("cat", "dog")]
    assert held_out.labels is not None
    assert held_out.labels.tolist() == [1]
    assert source_of(path, "val").num_images == 1
    assert source_of(path, "train[1:]").num_images == 2
    assert "has no split 'test'; its folders are train, val." in refusal(path, tmp_path / "cache", split="test")


def test_a_class_that_is_called_like_a_split_stays_a_class(tmp_path: Path) -> None:
    files = {"car/1.png": b"1", "train/1.png": b"2"}
    source = source_of(write_files(tmp_path / "vehicles", files))
    assert [source.num_images, source.class_names] == [2, ("car", "train")]


@pytest.mark.parametrize(("split", "rows"), [("train[1:3]", [1, 2]), ("train[:50%]", [0, 1]), ("train[-1:]", [3])])
def test_a_part_of_a_split_is_a_part_of_the_files(tmp_path: Path, split: str, rows: list[int]) -> None:
    images = open_source(write_files(tmp_path / "pets", FILES), tmp_path / "cache", split=split)
    assert np.array_equal(pixels_of(images), [list(IMAGES.values())[row] for row in rows])


@pytest.mark.parametrize("split", ["test", "train[", "train[5:2:3]", "train[:x]"])
def test_a_part_that_does_not_exist_is_refused(tmp_path: Path, split: str) -> None:
    message = refusal(write_files(tmp_path / "pets", FILES), tmp_path / "cache", split=split)
    assert "has no split 'test', only 'train' and parts of it" in message or "names no part of" in message


@pytest.mark.parametrize("name", ["pets", "pets.tar", "x.npy", "x.npz", "saved", "x.parquet", "splits"])
def test_parts_of_a_split_can_be_added(tmp_path: Path, name: str) -> None:
    """As `datasets` does it, whichever kind the data are of."""
    path, images = tmp_path / name, list(IMAGES.values())
    if name == "splits":
        write_files(path, {f"train/{file}": data for file, data in FILES.items()} | {"test/cat/9.png": encode(RGB)})
    elif name in ("pets", "pets.tar"):
        store(tmp_path, name, FILES)
    elif name == "x.npy":
        np.save(path, np.stack(images))
    elif name == "x.npz":
        np.savez(path, images=np.stack(images))
    else:
        write_parquet(tmp_path / "x.parquet", list(FILES.values()))
    if name == "saved":
        datasets.Dataset.from_parquet(str(tmp_path / "x.parquet")).save_to_disk(path)
    found = open_source(path, tmp_path / "cache", split="train[:1]+train[2:]")
    assert np.array_equal(pixels_of(found), [images[row] for row in (0, 2, 3)])


def test_parts_of_several_splits_are_not_added(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "x", {"train/1.png": encode(RGB), "test/1.png": encode(RGB)})
    message = refusal(folder, tmp_path / "cache", split="train+test[:1]")
    assert message == f"split 'train+test[:1]' of {folder} adds parts of train and test; give parts of one of them."


@pytest.mark.parametrize("split", ["train[", "train[:x]"])
def test_a_part_of_a_saved_data_set_that_does_not_exist_is_refused(tmp_path: Path, split: str) -> None:
    datasets.Dataset.from_dict({"image": [0, 1, 2, 3]}).save_to_disk(tmp_path / "saved")
    assert "names no part of" in refusal(tmp_path / "saved", tmp_path / "cache", split=split)


def test_a_part_without_images_is_refused(tmp_path: Path) -> None:
    """The same sentence from every kind of data set that is cut here; nothing is said of other files."""
    folder = write_files(tmp_path / "pets", FILES)
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 6, 5), np.uint8))
    datasets.Dataset.from_dict({"image": [0, 1, 2, 3]}).save_to_disk(tmp_path / "saved")
    for source in (folder, tmp_path / "x.npz", tmp_path / "saved"):
        for split in ("train[4:]", "train[:0]"):
            assert refusal(source, tmp_path / "cache", split=split) == (
                f"split {split!r} of {source} is empty, though 'train' has 4 images; ask for more."
            )


def test_an_image_outside_of_all_class_folders_is_named_where_labels_are_needed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "pets", FILES | {"stray.png": FILES["dog/1.png"]})
    assert open_source(folder, tmp_path / "cache").labels is not None
    message = refusal(folder, tmp_path / "cache", with_labels=True)
    assert message == f"image 4 of {folder} (stray.png) has no label; every image needs one from 0 to 1."


def test_links_are_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", {"1.png": FILES["cat/1.png"]})
    folder = write_files(tmp_path / "pets", {"dog/1.png": FILES["dog/1.png"]})
    (folder / "cat").symlink_to(tmp_path / "elsewhere")
    (folder / "dog" / "again").symlink_to(folder)
    images = open_source(folder, tmp_path / "cache", with_labels=True)
    assert [images.class_names, len(images)] == [("cat", "dog"), 2]


def test_the_order_of_links_is_that_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the disk: of several ways to the same images the first by name is taken."""
    folder = write_files(tmp_path / "pets", {"dogs/all/1.png": FILES["dog/1.png"]})
    (folder / "links").symlink_to(folder / "dogs" / "all")
    (folder / "all").symlink_to(folder / "dogs" / "all")
    walk = os.walk

    def turned(*arguments: Any, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for place, subfolders, names in walk(*arguments, **options):
            subfolders.sort(reverse=True)
            yield place, subfolders, names

    assert source_of(folder).class_names == ("all",)
    monkeypatch.setattr(os, "walk", turned)
    assert source_of(folder).class_names == ("all",)


def test_hard_links_in_a_tar_are_read(tmp_path: Path) -> None:
    """As tar itself packs files that lie in two folders at once; what symbolic links lead to is left out and named."""
    folder = write_files(tmp_path / "pets", FILES)
    (folder / "bird").mkdir()
    os.link(folder / "cat" / "1.png", folder / "bird" / "1.png")
    (folder / "dog" / "2.png").symlink_to("1.png")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(folder, ".")
    source = source_of(tmp_path / "x.tar.gz")
    assert [source.num_images, source.class_names] == [5, ("bird", "cat", "dog")]
    assert source.left_out == ("dog/2.png (a link or a device)",)
    images = open_source(tmp_path / "x.tar.gz", tmp_path / "cache")
    assert images.labels is not None
    (bird,) = np.flatnonzero(images.labels == 0)
    assert np.array_equal(pixels_of(images)[bird], IMAGES["cat/1.png"])


def test_a_hard_link_to_a_bomb_or_to_nothing_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, size, target in (("bomb", 2**25, ""), ("1.png", 0, "bomb"), ("2.png", 0, "gone")):
            member = tarfile.TarInfo(name)
            member.size, member.linkname = size, target
            member.type = tarfile.LNKTYPE if target else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(bytes(size)))
    bomb, nothing = source_of(path).read([0, 1])
    assert [bomb.problem, nothing.problem[:8]] == ["it would unpack to 33,554,432 bytes", "KeyError"]


def test_a_zip_with_backslashes_has_folders(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", {name.replace("/", "\\"): data for name, data in FILES.items()} | {"dog\\": b""})
    assert source_of(path).class_names == ("cat", "dog")
    assert source_of(path).left_out == ()


def test_a_link_that_leads_nowhere_is_a_bad_image(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "pets", {"cat/1.png": FILES["cat/1.png"]})
    (folder / "cat" / "2.png").symlink_to(folder / "gone.png")
    assert f"image 1 of {folder} (cat/2.png) cannot be read (No such file" in refusal(folder, tmp_path / "cache")


def test_what_is_no_regular_file_is_a_bad_image(tmp_path: Path) -> None:
    """Reading a pipe would wait for ever."""
    folder = write_files(tmp_path / "pets", {"cat/1.png": FILES["cat/1.png"]})
    os.mkfifo(folder / "cat" / "2.png")
    assert "(cat/2.png) cannot be read (it is no regular file)" in refusal(folder, tmp_path / "cache")


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
@pytest.mark.parametrize("part", [0, 0.05, 1 / 3, 0.6])
def test_a_truncated_archive_is_refused(tmp_path: Path, name: str, part: float) -> None:
    """Also between two images, where a tar only lacks its end: a third of the tar are ten images of 1024 bytes."""
    path = pack(tmp_path / name, {f"{number}.png": encode(RGB) for number in range(20)})
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    message = refusal(path, tmp_path / "cache")
    assert f"{path} cannot be read as a {'zip' if name == 'x.zip' else 'tar'} file" in message


def test_a_damaged_member_of_a_zip_is_a_bad_image(tmp_path: Path) -> None:
    """Its checksum is wrong, though a decoder might not notice."""
    path = pack(tmp_path / "x.zip", {"a.png": encode(RGB), "b.png": encode(RGB)})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"IDAT") + 5] ^= 1
    path.write_bytes(data)
    assert f"image 1 of {path} (b.png) cannot be read (BadZipFile: Bad CRC-32" in refusal(path, tmp_path / "cache")


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", {"a.png": encode(RGB)})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert refusal(path, tmp_path / "cache") == f"{path} is encrypted; unpack it and give the folder."


def test_a_member_that_would_fill_the_memory_is_a_bad_image(tmp_path: Path) -> None:
    """A zip says how large its members will be; this one says 3 GiB, and nobody tries."""
    path = pack(tmp_path / "x.zip", {"a.png": encode(RGB)})
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\x01\x02") + 24
    data[start : start + 4] = (3 * 2**30).to_bytes(4, "little")
    path.write_bytes(data)
    assert "(a.png) cannot be read (it would unpack to 3,221,225,472 bytes)" in refusal(path, tmp_path / "cache")


@pytest.mark.parametrize("name", KINDS[:3])
def test_a_change_of_any_file_changes_the_fingerprint(tmp_path: Path, name: str) -> None:
    first = source_of(store(tmp_path, name, FILES)).fingerprint
    assert source_of(tmp_path / name).fingerprint == first
    seen = {first}
    for files in (
        FILES | {"dog/1.png": FILES["cat/1.png"]},
        {**FILES, "dog/2.png": FILES["dog/1.png"]},
        {file.replace("dog/1", "dog/3"): data for file, data in FILES.items()},
    ):
        (tmp_path / str(len(seen))).mkdir()
        seen.add(source_of(store(tmp_path / str(len(seen)), name, files)).fingerprint)
    assert len(seen) == 4


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    folder = write_files(tmp_path / "pets", FILES)
    (folder / "cat").chmod(0)
    try:
        assert f"{folder / 'cat'} cannot be read (Permission denied)" in refusal(folder, tmp_path / "cache")
    finally:
        (folder / "cat").chmod(0o755)
