"""Converting an untrusted checkpoint of another system runs no code, and writes nothing."""

import pickle
from pathlib import Path

import pytest
import torch

from ddpm_hf.cli.main import main
from tests.security.conftest import Watch
from tests.security.hostile import pickle_that_runs, torch_file_that_runs

EVAL = b"\x80\x02cbuiltins\neval\nX\x0f\x00\x00\x00__import__('os')\x85R."


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "bin beside a configuration"])
@pytest.mark.parametrize("flags", [["--image_size", "8"], ["--recipe_only"]])
def test_a_checkpoint_of_another_system_runs_no_code(kind: str, flags: list[str], tmp_path: Path, watch: Watch) -> None:
    path, output = tmp_path / "model.pt", tmp_path / ("out.yaml" if "--recipe_only" in flags else "out")
    if kind == "legacy":
        torch.save({"weights": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
        head = path.read_bytes()
        magic, protocol, system = (pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
        assert head.startswith(magic)
        path.write_bytes(magic + protocol + system + pickle_that_runs(watch.canary))
    elif kind == "pickle":
        path.write_bytes(EVAL)
    elif kind == "zip":
        torch_file_that_runs(watch.canary, path)
    else:
        path = tmp_path / "unet_ema" / "diffusion_pytorch_model.bin"
        path.parent.mkdir()
        torch_file_that_runs(watch.canary, path)
        (path.parent / "config.json").write_text('{"_class_name": "UNet2DModel", "sample_size": 8}')
    assert main(["convert", str(path), str(output), *flags]) == 2
    assert not output.exists()
