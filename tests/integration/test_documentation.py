"""The code in the documents runs as it is written there."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from ddpm_hf import GaussianDiffusionPipeline, GaussianDiffusionScheduler

DOCS = Path(__file__).parents[2] / "docs"


def test_the_code_of_the_sampling_document_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the folder of a small class-conditional model in the place of the repository that it names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=3,
        )
    names = {"0": "cat", "1": "dog"}
    pipe = GaussianDiffusionPipeline(unet, GaussianDiffusionScheduler(), class_names=names, has_null_label=True)
    pipe.save_pretrained(tmp_path / "model")
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "sampling.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 10
    code = "\n".join(blocks)
    assert code.count('"user/model"') == 1
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    exec(compile(code.replace('"user/model"', '"model"'), "sampling.md", "exec"), space)  # noqa: S102
    for name in ("first.png", "strip.png", "denoising.gif"):
        assert (tmp_path / name).stat().st_size > 0
    assert len(space["between"]) == 8  # type: ignore[arg-type]
