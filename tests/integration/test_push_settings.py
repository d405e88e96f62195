"""What of a run's records is published names no place of the machine that it was trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ddpm_hf.hub.export import assemble
from tests.saved_folders import make_pipeline

SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"source": "ada/photos", "revision": None, "cache_dir": "private/cache"},
    "model": {"from_pretrained": "ada/old-run", "config_file": "ada/nets", "revision": None},
    "training": {"output_dir": "private/run"},
    "evaluation": {"score_features": "dinov2:/mnt/ada/nets/dino"},
    "hub": {"branch": "experiments/a/b"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with pictures, so that none are drawn."""
    folder = tmp_path_factory.mktemp("source")
    make_pipeline("plain").save_pretrained(folder)
    Image.new("L", (8, 8)).save(folder / "samples.png")
    return folder


def published(source: Path, target: Path, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the sections of training_config.yaml as one."""
    (source / "training_config.yaml").write_text(yaml.safe_dump(settings))
    assemble(source, target)
    sections = yaml.safe_load((target / "training_config.yaml").read_text())
    return {name: value for section in sections.values() for name, value in section.items()}


def test_relative_paths_of_settings_are_told_by_their_last_part_wherever_one_stands(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing says of these two-part names that they are ids; the branch is none, and no path."""
    monkeypatch.chdir(tmp_path)  # where no such folders are
    told = published(source, tmp_path / "target", SETTINGS)
    assert told == {
        "source": "photos", "revision": None, "cache_dir": "cache", "from_pretrained": "old-run", "config_file": "nets",
        "output_dir": "run", "score_features": "dinov2:dino", "branch": "experiments/a/b",
    }  # fmt: skip


def test_ids_of_the_hub_stay_and_records_name_no_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The summary tells an id from a path, as it was written where the data were; so does a revision."""
    (tmp_path / "ada" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (source / "training_summary.json").write_text('{"data": {"source": "ada/photos"}, "device": "/mnt/ada/gpu"}')
    (source / "evaluation.json").write_text('{"metrics": [{"name": "frechet_distance[dinov2:/mnt/ada/nets/dino]"}]}')
    told = published(source, tmp_path / "target", SETTINGS | {"model": SETTINGS["model"] | {"revision": "main"}})
    assert (told["source"], told["from_pretrained"], told["config_file"]) == ("ada/photos", "ada/old-run", "ada/nets")
    evaluation = json.loads((tmp_path / "target" / "evaluation.json").read_text())
    assert evaluation["metrics"][0]["name"] == "frechet_distance[dinov2:dino]"
    assert "mnt" not in (tmp_path / "target" / "training_summary.json").read_text()
