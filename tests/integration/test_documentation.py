"""The code in the documents runs as it is written there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from ddpm_hf import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.commands.evaluate_flags import data_config, parse
from ddpm_hf.config import EvaluationConfig, load_config
from ddpm_hf.evaluation.evaluate import METRICS, check_metrics
from ddpm_hf.evaluation.sampling import scheduler_class

DOCS = Path(__file__).parents[2] / "docs"
EVALUATION = (DOCS / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", EVALUATION, re.S) for line in block.splitlines()]


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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_evaluation_document_is_accepted(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """As a dry run: what it does is the matter of tests/integration/test_evaluate_command.py."""
    monkeypatch.chdir(DOCS.parent)
    if command.startswith("ddpm-hf train "):
        config, _ = load_config(shlex.split(command)[2:])
        assert config.evaluation.score_every_steps > 0
        return
    program, _, rest = command.partition(" evaluate ")
    assert program in ("ddpm-hf", "torchrun --nproc_per_node 8 -m ddpm_hf")
    options = parse(shlex.split(rest))
    check_metrics(options.metrics)
    assert data_config(options, (8, 8), 1).source == options.data
    if options.scheduler is not None:
        scheduler_class(options.scheduler)


def test_the_evaluation_document_names_what_there_is() -> None:
    assert len(COMMANDS) >= 6
    assert set(re.findall(r"^\| `(\w+)` \|", EVALUATION, re.M)) >= set(METRICS)
    assert set(re.findall(r"evaluation\.(score_\w+)", EVALUATION)) <= set(EvaluationConfig.__dataclass_fields__)
    flags = {f"--{name}" for name in vars(parse(["x", "--data", "y"]))}
    named = set(re.findall(r"`(--\w+)(?=[ `])", EVALUATION))
    assert named - {"--data"} <= flags
