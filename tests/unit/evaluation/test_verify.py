"""A changed copy of a saved pipeline is detected by its contents and its outputs, in each way of loading it."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from ddpm_hf.cli.main import main
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.evaluation.verify import Finding, verify, write_verification
from ddpm_hf.files import VERIFICATION
from tests import version_0_1
from tests.conftest import tiny_unet

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
WAYS = ("with ddpm_hf", "with diffusers alone", "with the code in the folder")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    unet = tiny_unet()
    with torch.no_grad():  # a fresh network ends in zeros
        unet.conv_out.weight.normal_(generator=torch.Generator().manual_seed(1))
    GaussianDiffusionPipeline(unet, GaussianDiffusionScheduler()).save_pretrained(folder)
    write_verification(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def outcome(folder: Path) -> dict[str, str]:
    """Way -> problem."""
    return {finding.way: finding.problem for finding in verify(folder)}


def test_an_exact_copy_is_the_same_in_all_three_ways(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == [
        "with ddpm_hf", "with diffusers alone", "with the code in the folder",
    ]  # fmt: skip
    assert all("the same" in line for line in lines[:3])
    assert lines[3] == f"{copy} is the pipeline that was saved."


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "cosine", "prediction_type": "v", "clip_sample_range": 1.0},
        {"variance_type": "learned_range", "beta_schedule": "sigmoid"},
        {"variance_type": "fixed_large", "timestep_spacing": "trailing"},
        {"prediction_type": "v", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"num_train_timesteps": 3, "prediction_type": "x0", "timestep_spacing": "linspace"},
    ],
    ids=str,
)
def test_the_pipeline_of_any_process_is_the_same_in_each_way(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Also where the stock scheduler would add noise in the last of a few steps: fixed_large, not ending at t = 0."""
    unet = tiny_unet(learned_variance=settings.get("variance_type") == "learned_range")
    with torch.no_grad():
        unet.conv_out.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    GaussianDiffusionPipeline(unet, GaussianDiffusionScheduler.create(**settings)).save_pretrained(tmp_path / "model")
    write_verification(tmp_path / "model")
    assert outcome(tmp_path / "model") == dict.fromkeys(WAYS, "")


def test_a_folder_of_0_1_is_the_same_in_each_way_with_its_own_code(tmp_path: Path) -> None:
    """Its twelve Python files are known; with one byte changed they run only with consent."""
    folder = Path(shutil.copytree(version_0_1.SAVED, tmp_path / "pipeline"))
    findings = {finding.way: finding for finding in verify(folder)}
    assert not any(finding.is_bad or finding.is_open for finding in findings.values())
    assert findings["with the code in the folder"].difference is not None
    (folder / "folder.py").write_text((folder / "folder.py").read_text() + "#\n")
    findings = {finding.way: finding for finding in verify(folder)}
    assert findings["with the code in the folder"].is_open
    assert findings["with the code in the folder"].difference is None


def test_code_of_another_folder_that_this_process_runs_is_left_alone(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers executes the code of each local folder in one module, and takes its only pipeline class."""
    other = ModuleType("diffusers_modules.local.pipeline")
    other.__package__ = "diffusers_modules.local"
    other.Other = type("Other", (DiffusionPipeline,), {"__module__": other.__name__})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, other.__name__, other)
    before = set(sys.modules)
    assert outcome(copy) == dict.fromkeys(WAYS, "")
    assert sys.modules[other.__name__] is other
    assert not [name for name in set(sys.modules) - before if name.startswith("diffusers_modules.local")]


def test_a_changed_weight_is_detected_by_digest_and_by_output(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(copy / WEIGHTS)
    tensors["conv_out.weight"] *= 1.1
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    problems = outcome(copy)
    assert problems[WEIGHTS] == "has other bytes than were saved"
    assert problems["the weights"] == "have other values (conv_out.weight)"
    for way in ("with ddpm_hf", "with diffusers alone", "with the code in the folder"):
        assert "the network's output differs" in problems[way]
    assert main(["verify", str(copy)]) == 1
    assert f"{copy} is NOT the pipeline that was saved." in capsys.readouterr().out


def test_the_same_weights_in_other_bytes_are_the_same_pipeline(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(load_file(copy / WEIGHTS), copy / WEIGHTS, {"format": "pt", "note": "saved again"})
    findings = verify(copy)
    assert [finding.way for finding in findings if finding.problem] == [WEIGHTS]
    assert not any(finding.is_bad for finding in findings)
    assert main(["verify", str(copy)]) == 0
    said = capsys.readouterr().out
    assert f"{WEIGHTS} note: has other bytes than were saved" in said
    assert said.endswith(f"{copy} holds the same as the pipeline that was saved.\n")


def test_another_scheduler_is_detected_in_the_image(copy: Path) -> None:
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.01}))
    problems = outcome(copy)
    assert "the sampled image differs" in problems["with ddpm_hf"]


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pipeline with more labels than are evaluated and settings that a few steps do not show."""
    folder = tmp_path_factory.mktemp("labeled") / "pipeline"
    unet = tiny_unet(num_class_embeds=20)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the last convolutions of a fresh network's blocks are zeros too, so labels have no effect
        for name, parameter in unet.named_parameters():
            if name.endswith("conv2.weight") or name == "conv_out.weight":
                parameter.normal_(std=0.2, generator=generator)
    scheduler = GaussianDiffusionScheduler.create(
        prediction_type="v", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    names = {str(label): f"class {label}" for label in range(19)}
    GaussianDiffusionPipeline(unet, scheduler, class_names=names, has_null_label=True).save_pretrained(folder)
    write_verification(folder)
    return folder


@pytest.fixture
def labeled_copy(labeled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(labeled, tmp_path / "copy"))


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("label", "is_evaluated"), [(3, True), (17, False), (19, True)], ids=["evaluated", "not evaluated", "null label"]
)
def test_one_changed_label_embedding_is_another_pipeline(labeled_copy: Path, label: int, is_evaluated: bool) -> None:
    tensors = load_file(labeled_copy / WEIGHTS)
    tensors["class_embedding.weight"][label] *= 2
    save_file(tensors, labeled_copy / WEIGHTS, {"format": "pt"})
    findings = {finding.way: finding for finding in verify(labeled_copy)}
    assert findings["the weights"].problem == "have other values (class_embedding.weight)"
    assert findings["the weights"].is_bad
    assert findings["with ddpm_hf"].is_bad == is_evaluated


@pytest.mark.parametrize(
    ("file", "changes", "part", "problem"),
    [
        ("scheduler/scheduler_config.json", {"timestep_spacing": "leading"}, "the scheduler",
         "timestep_spacing was trailing, is leading"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": False}, "the scheduler",
         "rescale_betas_zero_snr was true, is false"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "the scheduler",
         "_class_name was DDPMScheduler, is DDIMScheduler"),
        ("unet/config.json", {"dropout": 0.5}, "the network", "dropout was 0.0, is 0.5"),
        ("model_index.json", {"has_null_label": False}, "model_index.json", "has_null_label was true, is false"),
    ],
)  # fmt: skip
def test_another_setting_is_another_pipeline_also_where_the_numbers_are_the_same(
    labeled_copy: Path, file: str, changes: dict[str, object], part: str, problem: str
) -> None:
    if changes.get("has_null_label") is False:  # which needs a name more
        names = json.loads((labeled_copy / file).read_text())["class_names"]
        changes |= {"class_names": names | {"19": "class 19"}}
    if "_class_name" in changes:
        change_json(labeled_copy / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    change_json(labeled_copy / file, **changes)
    findings = {finding.way: finding for finding in verify(labeled_copy)}
    assert problem in findings[f"settings of {part}"].problem
    assert findings[f"settings of {part}"].is_bad


def test_settings_that_are_left_to_their_defaults_are_the_same(labeled_copy: Path) -> None:
    """As another version of diffusers writes them, in another order; also if verification.json lacks a setting."""
    record = json.loads((labeled_copy / VERIFICATION).read_text())
    assert record["settings"]["the network"].pop("downsample_type") == "conv"
    (labeled_copy / VERIFICATION).write_text(json.dumps(record))
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        path = labeled_copy / file
        content = json.loads(path.read_text())
        shorter = {
            name: content[name] for name in sorted(content, reverse=True) if name not in ("dropout", "thresholding")
        }
        assert len(shorter) == len(content) - 1
        path.write_text(json.dumps(shorter | {"_diffusers_version": "0.1.0"}))
    findings = verify(labeled_copy)
    assert not any(finding.is_bad for finding in findings)
    assert [finding.way for finding in findings if finding.is_other_file] == [
        "unet/config.json", "scheduler/scheduler_config.json",
    ]  # fmt: skip


def test_half_precision_weights_are_the_others_rounded(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And were not there when verification.json was written, as where they are published."""
    pipeline = GaussianDiffusionPipeline.from_pretrained(copy)
    pipeline.unet.half()
    pipeline.save_pretrained(copy, variant="fp16")
    assert outcome(copy) == dict.fromkeys(WAYS, "")
    path = copy / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    halves = load_file(path)

    def finding() -> Finding:
        (found,) = [finding for finding in verify(copy) if finding.way == "unet/*.fp16.safetensors"]
        assert found.is_bad
        return found

    save_file({name: tensor for name, tensor in halves.items() if name != "conv_in.bias"}, path, {"format": "pt"})
    assert finding().problem == "holds other weights (conv_in.bias)"
    path.write_bytes(path.read_bytes()[:-100])
    assert finding().problem.startswith("cannot be read (")
    save_file(halves | {"conv_in.bias": halves["conv_in.bias"] + 0.01}, path, {"format": "pt"})
    assert finding().problem == "holds other weights (conv_in.bias)"
    assert main(["verify", str(copy)]) == 1
    assert "unet/*.fp16.safetensors         differs: holds other weights" in capsys.readouterr().out


def test_what_is_not_verified_is_reported(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights without EMA beside those with it, and second moments that were estimated later."""
    weights = {name: tensor + 0.01 for name, tensor in load_file(copy / WEIGHTS).items()}
    save_file(weights, copy / "unet" / "diffusion_pytorch_model.non_ema.safetensors", {"format": "pt"})
    moments = {"eps_second_moments": [0.5] * 1000}
    (copy / "scheduler" / "reverse_variance.json").write_text(json.dumps(moments))
    assert main(["verify", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "note: holds other weights (conv_in.bias and" in said
    assert "second moments                  note: were estimated after verification.json was written" in said
    assert said.endswith(f"{copy} is the pipeline that was saved, but for what the notes leave open.\n")
    write_verification(copy)
    moments["eps_second_moments"][3] = 0.6
    (copy / "scheduler" / "reverse_variance.json").write_text(json.dumps(moments))
    assert outcome(copy)["the weights"] == "have other values (eps_second_moments)"


def test_all_labels_of_a_network_for_large_images_are_evaluated_on_small_noise(tmp_path: Path) -> None:
    """Seventeen images of 256 pixels would not fit into the memory that training leaves."""
    unet = tiny_unet(num_class_embeds=20)
    unet.register_to_config(sample_size=(64, 40))
    GaussianDiffusionPipeline(unet, GaussianDiffusionScheduler(num_train_timesteps=1)).save_pretrained(tmp_path)
    write_verification(tmp_path)
    record = json.loads((tmp_path / VERIFICATION).read_text())
    assert record["labels"] == [*range(16), 19]
    assert record["network"]["shape"] == [17, 1, 32, 32]
    assert record["image"]["shape"] == [1, 1, 64, 40]


@pytest.mark.parametrize("damage", ["truncate", "remove", "nan"])
def test_damaged_weights_are_a_finding(copy: Path, damage: str) -> None:
    path = copy / WEIGHTS
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "remove":
        path.unlink()
    else:
        save_file(load_file(path) | {"conv_in.bias": torch.full((8,), torch.nan)}, path, {"format": "pt"})
    findings = {finding.way: finding for finding in verify(copy)}
    assert findings["with ddpm_hf"].is_bad
    assert WEIGHTS in findings


def test_a_class_conditional_model_is_not_loaded_as_a_stock_pipeline(tmp_path: Path) -> None:
    pipeline = GaussianDiffusionPipeline(tiny_unet(num_class_embeds=3), GaussianDiffusionScheduler())
    pipeline.save_pretrained(tmp_path)
    write_verification(tmp_path)
    findings = {finding.way: finding for finding in verify(tmp_path)}
    assert findings["with diffusers alone"].problem == "the stock pipeline does not support classes"
    assert findings["with the code in the folder"].difference is not None
    assert not any(finding.is_bad for finding in findings.values())


@pytest.mark.parametrize("attack", ["other code", "one more module", "index"])
def test_code_that_is_not_ours_runs_only_with_consent(copy: Path, attack: str) -> None:
    canary = copy.parent / "canary"
    payload = f"\nfrom pathlib import Path\nPath({str(canary)!r}).touch()\n"
    if attack == "other code":
        path = copy / "pipeline.py"
        path.write_text(path.read_text() + payload)
    elif attack == "one more module":
        (copy / "unet" / "extra.py").write_text(payload)
    else:
        path = copy / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"unet": ["antigravity", "UNet2DModel"]}))
    findings = {finding.way: finding for finding in verify(copy)}
    assert not canary.exists()
    if attack != "index":  # which does not load at all
        assert "read it, then pass --trust_remote_code" in findings["with the code in the folder"].problem
        assert findings["with the code in the folder"].difference is None
    if attack == "other code":
        verify(copy, run_code=True)
        assert canary.exists(), "with consent the code runs"


@pytest.mark.parametrize("flags", [[], ["--trust_remote_code"]])
def test_a_folder_without_code_is_the_pipeline_that_was_saved(
    copy: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    for path in list(copy.rglob("*.py")):
        path.unlink()
    assert main(["verify", str(copy), *flags]) == 0
    *_, about_code, verdict = capsys.readouterr().out.splitlines()
    assert about_code.startswith("with the code in the folder ")
    assert about_code.endswith(" note: there is no code in it")
    assert verdict == f"{copy} is the pipeline that was saved."


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, f"has no {VERIFICATION}; write one with"),
        ("{", "is not valid JSON .*; if you know that the folder is what was saved, write it again"),
        ("[]", "must contain a JSON object"),
        ({"settings": {"the network": 1}}, "is incomplete; if you know"),
        ({"network": {}}, "is incomplete"),
        ({"schema": 99}, "was written by another version of ddpm_hf \\(schema 99, not 3\\)"),
    ],
)
def test_a_damaged_verification_is_one_message(copy: Path, content: Any, sentence: str) -> None:
    path = copy / VERIFICATION
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(ValueError, match=sentence):
        verify(copy)


def test_a_folder_without_a_pipeline_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no pipeline (model_index.json)" in capsys.readouterr().err
