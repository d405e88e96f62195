"""A card says what the folder records, its code runs, and no edit of a card on the Hub is lost."""

import configparser
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm_hf.config import (
    DataConfig,
    DiffusionConfig,
    DistillationConfig,
    EvaluationConfig,
    ObjectiveConfig,
    RunConfig,
    TrainingConfig,
)
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.evaluation.metrics import Metric
from ddpm_hf.evaluation.report import as_json
from ddpm_hf.hub import card as card_module
from ddpm_hf.hub.card import COMMENT, Card, make_card
from ddpm_hf.models import sampling_scheduler
from tests.saved_folders import make_pipeline
from tests.unit.diffusion.oracles import tiny_unet

REPO_ID = "ada/tiny-ddpm"
INCEPTION = "Inception-v3 of 2015-12-05, 2048 features"
FID = Metric(name="fid", value=3.25, standard_error=0.04, features=INCEPTION, num_samples=50_000, num_reference=1527)
BITS = Metric(
    name="bits_per_dim", value=4.2, standard_error=None, features=None, num_samples=270, num_reference=0
)  # fmt: skip
SAMPLING = {
    "schema_version": 1, "pipeline": "abc", "seed": 7, "scheduler": "GaussianDiffusionScheduler",
    "num_inference_steps": 50, "eta": 0.0, "timestep_spacing": "trailing", "guidance_scale": 1.0,
    "guidance_rescale": 0.0, "analytic_variance": False, "labels": None, "dtype": "float32", "device": "cuda",
}  # fmt: skip
BOUND = {"images": "held out", "num_steps": 1000, "num_terms": 50, "variance": "fixed_large"}
DATA = {
    "source": "digits.parquet", "split": "train", "fingerprint": "0f", "num_training_images": 1527,
    "num_held_out_images": 270,
}  # fmt: skip
RECOGNITION = {"num_samples": 500, "recognised": 0.996, "recognised_held_out": 0.989}
SUMMARY: dict[str, Any] = {
    "step": 2000, "num_steps": 2000, "num_images_seen": 128_000, "seconds": 3725.0, "device": "NVIDIA H100",
    "num_processes": 2, "num_parameters": 1_003_201,
    "data": {"source": "digits.parquet", "num_images": 1527, "num_classes": None}, "loss": 0.0312,
    "score": {"score_metric": "fid", "score": 5.5, "score_num_samples": 1000, "score_features": None},
    "versions": {"torch": "2.13.0", "diffusers": "0.42.1", "ddpm_hf": "0.1.0"},
}  # fmt: skip
CONFIG = RunConfig(
    data=DataConfig(source="/mnt/ada/secret place/digits.parquet", validation_fraction=0.15),
    diffusion=DiffusionConfig(beta_schedule="cosine", prediction_type="v_prediction"),
    objective=ObjectiveConfig(weighting="min_snr"),
    training=TrainingConfig(output_dir="/mnt/ada/secret place/run", mixed_precision="fp32", seed=3),
    evaluation=EvaluationConfig(num_inference_steps=3, eta=0.0),
)
PICTURES = ("samples.png", "denoising.png", "denoising.gif", "loss.png", "schedule.png", "evaluation.png")
CARD_OF_0_1 = (Path(__file__).parent / "card_of_0_1.txt").read_text(encoding="utf-8")

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved pipelines; the one for stock classes has a short forward process."""
    folder = tmp_path_factory.mktemp("pipelines")
    scheduler = GaussianDiffusionScheduler.create(num_train_timesteps=10, beta_schedule="cosine", prediction_type="v")
    GaussianDiffusionPipeline(tiny_unet(), scheduler).save_pretrained(folder / "plain")
    for name in ("guided", "self_conditioned", "learned"):
        make_pipeline(name).save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder_of(pipelines: Path, tmp_path: Path) -> Folder:
    """Return a function that makes a folder: a pipeline, the records of a run, and changes to them."""

    def make(name: str = "plain", *, bare: bool = False, **files: Any) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(pipelines / name, folder)
        contents = {} if bare else {"training_config.yaml": CONFIG.to_yaml(), "training_summary.json": SUMMARY}
        for file, content in (contents | {name.replace("__", "."): file for name, file in files.items()}).items():
            (folder / file).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return folder

    return make


def evaluation(*metrics: Metric, sampling: dict[str, Any] | None = None, **changes: Any) -> str:
    """Return evaluation.json as `ddpm-hf evaluate` writes it."""
    data = DATA | {name: value for name, value in changes.items() if name in DATA}
    bound = BOUND | {name: value for name, value in changes.items() if name not in DATA}
    return as_json(metrics, None, settings=SAMPLING | (sampling or {}), data=data, bound_settings=bound)


def card_of(folder: Path, existing: str | None = None, **arguments: Any) -> Card:
    return make_card(folder, repo_id=REPO_ID, existing=existing, **arguments)


def data_of(text: str) -> dict[str, Any]:
    """Return the metadata as huggingface_hub reads it."""
    return dict(ModelCard(text).data.to_dict())


def body_of(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def section_of(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found is not None
    return found[1]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def metrics_of(text: str) -> list[dict[str, Any]]:
    return [metric for result in data_of(text)["model-index"][0]["results"] for metric in result["metrics"]]


def test_results_on_a_hub_dataset_are_entries_of_the_hubs_format(folder_of: Folder) -> None:
    """One file per result, which the client reads; other data have no place for results."""
    revision = "5503434ddd753f426f4b38109466949a1217c2bb"
    data = DataConfig(source="ada/birds", revision=revision)
    files = {
        "training_config__yaml": RunConfig(data=data).to_yaml(),
        "training_summary__json": SUMMARY | {"data": {"source": "ada/birds"}},
        "evaluation__json": evaluation(FID, BITS, source="ada/birds"),
    }
    found = card_module.eval_results(folder_of(**files), REPO_ID)
    assert found.keys() == {"ddpm_hf_fid_50k_inception.yaml", "ddpm_hf_bits_per_dimension_of_270_images.yaml"}
    [entry] = parse_eval_result_entries(yaml.safe_load(found["ddpm_hf_fid_50k_inception.yaml"]))
    assert (entry.dataset_id, entry.dataset_revision) == ("ada/birds", revision)
    assert (entry.task_id, entry.value) == ("fid", 3.25)
    assert entry.source_url == f"https://huggingface.co/{REPO_ID}/blob/main/evaluation.json"
    assert entry.notes is not None
    assert "lower is better" in entry.notes
    assert "num_samples 50000" in entry.notes
    assert INCEPTION in entry.notes
    assert card_module.eval_results(folder_of(evaluation__json=evaluation(FID)), REPO_ID) == {}


# What a card says


def test_a_card_of_a_student_states_its_steps_its_teacher_and_its_guidance(folder_of: Folder) -> None:
    settings = DistillationConfig(teacher="a/b", num_inference_steps=4, guidance_scale=2.0)
    folder = folder_of(training_summary__json=SUMMARY | {"base_model": "user/teacher"})
    pipeline = GaussianDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = sampling_scheduler(pipeline.scheduler, settings)
    pipeline.save_pretrained(folder)
    text = card_of(folder).text
    for words in (
        "**Distilled from:** [user/teacher]",
        "**Sampling steps:** 4, of DDIM",
        "guidance of scale 2 is part",
    ):
        assert words in section_of(text, "Model description")
    assert all("num_inference_steps=4" in block for block in code_blocks(section_of(text, "How to use")))
    assert "salimans2022progressive" in section_of(text, "Citation")


def test_the_sections_are_those_of_a_hugging_face_card_and_only_those_with_facts(folder_of: Folder) -> None:
    folder = folder_of("guided", evaluation__json=evaluation(FID, BITS), recognition__json=RECOGNITION)
    (folder / "verification.json").write_text("{}")
    (folder / "samples").mkdir()
    for name in PICTURES:
        (folder / "samples" / name).touch()
    text = card_of(folder).text
    assert body_of(text).startswith(f"\n{COMMENT}\n\n# tiny-ddpm\n")
    always = ["Model description", "How to use", "Evaluation results", "Limitations", "Citation"]
    full = ["Model description", "Samples", "How to use", "Training data", "Training procedure"]
    full += ["Evaluation results", "Limitations", "Framework versions", "Citation"]
    assert re.findall(r"^## (.*)", text, re.M) == full
    assert sorted(re.findall(r"\]\(samples/(.*?)\)", text)) == sorted(PICTURES)
    assert f"ddpm-hf verify {REPO_ID}" in text
    bare = card_of(folder_of(bare=True)).text
    assert re.findall(r"^## (.*)", bare, re.M) == always
    assert "](samples/" not in bare and "ddpm-hf verify" not in bare
    for words in (bare, text):
        assert not re.search(r"\bNone\b|\bnan\b|Undefined", words)


@pytest.mark.parametrize(
    ("name", "num_ways", "labels"),
    [("plain", 3, None), ("guided", 2, "['cat', 'dog']"), ("self_conditioned", 2, None), ("learned", 2, None)],
)
def test_every_way_to_load_that_a_card_shows_runs(
    name: str, num_ways: int, labels: str | None, folder_of: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one seed, the code in the folder and the installed class draw the same bits."""
    folder = folder_of(name)
    blocks = code_blocks(card_of(folder).text)
    assert len(blocks) == num_ways
    monkeypatch.chdir(tmp_path)
    drawn = []
    for block in blocks:
        names: dict[str, Any] = {}
        torch.manual_seed(0)
        exec(block.replace(REPO_ID, str(folder)), names)  # noqa: S102
        (tmp_path / "sample.png").unlink()
        drawn.append([image.tobytes() for image in names["images"]])
        assert (f"class_labels={labels}" in block) == (labels is not None)
    assert len(drawn[-1]) == (2 if labels else 4)
    assert drawn[-1] == drawn[-2]


def test_the_code_samples_as_the_report_of_the_run_did(folder_of: Folder) -> None:
    stock, *native = code_blocks(card_of(folder_of()).text)
    assert "pipeline(batch_size=4, num_inference_steps=10).images" in stock
    assert all("num_inference_steps=3, eta=0.0)" in block for block in native)
    assert "pipeline(batch_size=4).images" in code_blocks(card_of(folder_of(bare=True)).text)[1]


def test_half_precision_weights_are_offered_if_there_are_any(folder_of: Folder) -> None:
    folder = folder_of()
    assert "half precision" not in card_of(folder).text
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    text = card_of(folder).text
    assert not any("variant" in block for block in code_blocks(text))
    assert '`variant="fp16"`' in text and "`dtype=torch.float16`" in text
    make_pipeline("plain").to(torch.float16).save_pretrained(folder, variant="fp16")
    load = GaussianDiffusionPipeline.from_pretrained
    assert load(folder, variant="fp16").unet.dtype == torch.float32
    assert load(folder, variant="fp16", dtype=torch.float16).unet.dtype == torch.float16


def test_the_value_range_is_stated(folder_of: Folder) -> None:
    folder = folder_of()
    assert "values in" not in card_of(folder).text
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"value_range": [-1000.5, 400.0]}))
    assert 'Pass `output_type="np"` for values in [-1000.5, 400]' in card_of(folder).text


def test_metadata_is_what_the_hub_reads(folder_of: Folder) -> None:
    text = card_of(folder_of("guided", evaluation__json=evaluation(FID, BITS), recognition__json=RECOGNITION)).text
    data = data_of(text)
    assert ModelCardData(**yaml.safe_load(text.split("---\n")[1])).to_dict() == data
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "unconditional-image-generation")
    assert data["license"] == "unknown"
    assert {"ddpm", "diffusers", "diffusers-training", "ddpm_hf", "pytorch", "class-conditional"} <= set(data["tags"])
    assert data["metrics"] == ["fid", "bits_per_dim", "accuracy"]
    (model,) = data["model-index"]
    assert model["name"] == "tiny-ddpm"
    assert model["results"][0]["dataset"] == {"name": "digits.parquet", "type": "digits.parquet", "split": "train"}
    fid, bits, recognized = metrics_of(text)
    evaluator = fid["args"].pop("evaluator")
    assert evaluator.startswith("ddpm_hf ")
    assert (fid["type"], fid["value"], fid["name"]) == ("fid", 3.25, "FID-50k (Inception)")
    assert fid["args"] == {
        "standard_error": 0.04, "num_samples": 50_000, "num_reference": 1527, "features": INCEPTION, "seed": 7,
        "sampler": "GaussianDiffusionScheduler", "num_inference_steps": 50, "eta": 0.0, "guidance_scale": 1.0,
        "timestep_spacing": "trailing", "dtype": "float32", "device": "cuda",
    }  # fmt: skip
    assert bits["args"] == {"evaluator": evaluator, "num_samples": 270, "num_reference": 0, "seed": 7, **BOUND}
    assert (recognized["type"], recognized["value"]) == ("accuracy", 0.996)
    assert recognized["args"]["accuracy_on_validation_images"] == 0.989
    other = data_of(card_of(folder_of(evaluation__json=evaluation(FID, source="eve/test-set"))).text)
    assert other["model-index"][0]["results"][0]["dataset"]["type"] == "eve/test-set"
    plain = data_of(card_of(folder_of(), license="apache-2.0").text)
    assert plain["license"] == "apache-2.0"
    assert "class-conditional" not in plain["tags"]
    assert not {"model-index", "metrics", "datasets", "base_model"} & set(plain)


def test_evaluation_results_have_errors_and_settings_and_the_recognized_share(folder_of: Folder) -> None:
    text = card_of(folder_of(evaluation__json=evaluation(FID, BITS), recognition__json=RECOGNITION)).text
    section = section_of(text, "Evaluation results")
    assert "| FID-50k (Inception) | 3.25 | 0.04 | lower | 50,000 | 1,527 |" in section
    assert "| bits per dimension of 270 images | 4.2 |  | lower | 270 |  |" in section
    assert "| GAN-test accuracy | 0.996 |  | higher | 500 |  |" in section
    assert "99.6% of the generated samples" in section and "98.9% of the real images" in section
    assert "50 steps of GaussianDiffusionScheduler, eta 0, seed 7, float32 on cuda" in section
    bad = Metric(**{**FID.__dict__, "value": math.nan})
    kid = Metric(**{**FID.__dict__, "name": "kid", "standard_error": math.nan})
    text = card_of(folder_of(evaluation__json=evaluation(bad, kid))).text
    (metric,) = metrics_of(text)
    assert metric["type"] == "kid" and "standard_error" not in metric["args"]
    assert "| FID-50k (Inception) | not finite |" in text
    assert "nan" not in text


def test_copies_of_training_images_are_stated_with_those_of_the_validation_set(folder_of: Folder) -> None:
    copies = Metric(
        name="memorization", value=0.125, standard_error=0.01, features="pixels", num_samples=1000, num_reference=1527,
        validation_value=0.004, num_validation=270,
    )  # fmt: skip
    text = card_of(folder_of(evaluation__json=evaluation(copies, FID))).text
    assert "| memorization-1k (pixels) | 0.125 | 0.01 | lower | 1,000 | 1,527 |" in text
    assert "12.5% of the samples are copies" in text
    assert "of 270 validation images, which the model has not seen, 0.4% are." in text
    assert f"Features: {INCEPTION}." in text and "Features: pixels" not in text
    assert "yoon2023diffusion" in text
    assert metrics_of(text)[0]["args"]["validation_value"] == 0.004


def test_bits_per_dimension_name_their_images_and_condition(folder_of: Folder) -> None:
    def title(**bound: Any) -> str:
        return str(metrics_of(card_of(folder_of(evaluation__json=evaluation(BITS, **bound))).text)[0]["name"])

    assert title() == "bits per dimension of 270 images"
    assert title(images="all", conditional=True) == "bits per dimension of 270 training images, given the class"


def test_the_command_to_reproduce_an_evaluation_has_the_flags_of_evaluation_json(folder_of: Folder) -> None:
    flags = ["--data=my digits.parquet", "--metrics=fid", "--labels=a\n```\nb"]
    text = card_of(folder_of(evaluation__json=json.dumps(json.loads(evaluation(FID)) | {"flags": flags}))).text
    (line,) = re.findall(r"^ddpm-hf evaluate .*$", text, re.M)
    assert shlex.split(line)[2:] == [REPO_ID, *flags[:2], "--labels=a ``` b", "--output", "evaluation"]
    assert "ddpm-hf evaluate" not in card_of(folder_of(evaluation__json=evaluation(FID))).text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("evaluation__json", content) for content in (
            "{", "[1]", "{}", '{"schema_version": 2, "metrics": []}', '{"schema_version": 1}',
            '{"schema_version": 1, "metrics": 3}', '{"schema_version": 1, "metrics": [{"name": "fid"}]}',
            '{"schema_version": 1, "metrics": [{"name": "fid", "value": "low", "num_samples": 5}]}',
            '{"schema_version": 1, "metrics": [{"name": "a b", "value": 1, "num_samples": 5}]}', "[" * 100_000,
        )),
        ("recognition__json", '{"recognised": 99}'),
        ("training_config__yaml", "a: ["),
    ],
)  # fmt: skip
def test_a_broken_record_is_refused_in_one_sentence(file: str, content: str, folder_of: Folder) -> None:
    with pytest.raises(ValueError, match=rf"{file.replace('__', '[.]')} .*\.$") as caught:
        card_of(folder_of(**{file: content}))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no pipeline \(model_index.json is missing\)"):
        card_of(tmp_path)


@pytest.mark.parametrize(
    ("source", "shown", "is_id"),
    [
        ("uoft-cs/cifar10", "uoft-cs/cifar10", True),
        ("data/digits.parquet", "digits.parquet", False),
        ("/mnt/ada/photos", "photos", False),
        ("C:\\Users\\ada\\photos\\", "photos", False),
    ],
)
def test_only_a_hub_id_is_listed_as_a_data_set(source: str, shown: str, is_id: bool, folder_of: Folder) -> None:
    text = card_of(folder_of(training_summary__json=SUMMARY | {"data": {"source": source, "num_images": 9}})).text
    assert data_of(text).get("datasets") == ([source] if is_id else None)
    link = f"[{shown}](https://huggingface.co/datasets/{shown})" if is_id else shown
    assert f"9 images of {link}." in section_of(text, "Training data")


def test_a_relative_path_in_the_configuration_is_not_taken_for_a_hub_id(folder_of: Folder) -> None:
    def data(**changes: Any) -> dict[str, Any]:
        config = RunConfig().to_dict()
        for name, value in changes.items():
            section, _, key = name.partition("__")
            config[section][key] = value
        return data_of(card_of(folder_of(bare=True, training_config__yaml=yaml.safe_dump(config))).text)

    assert not {"datasets", "base_model"} & data(data__source="ada/photos", model__from_pretrained="ada/old").keys()
    assert data(data__source="ada/photos", data__revision="main")["datasets"] == ["ada/photos"]
    assert data(model__from_pretrained="ada/old", model__revision="main")["base_model"] == "ada/old"


def test_a_fine_tuned_model_names_its_base_model(folder_of: Folder) -> None:
    text = card_of(folder_of(training_summary__json=SUMMARY | {"base_model": "google/ddpm-cifar10-32"})).text
    assert data_of(text)["base_model"] == "google/ddpm-cifar10-32"
    assert "[google/ddpm-cifar10-32](https://huggingface.co/google/ddpm-cifar10-32)" in text


def test_a_card_holds_no_secret_and_no_local_path(folder_of: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    token, password = "hf_" + "a1B2" * 10, "s_e*c-r[e]t"
    monkeypatch.setenv("SOME_TOKEN", password)
    features = Metric(
        name="frechet_distance[dinov2:/mnt/ada/nets/dino]", value=1.0, standard_error=None,
        features=f"Dino of file:///mnt/ada/nets/dino, {token}", num_samples=10, num_reference=10,
    )  # fmt: skip
    summary = SUMMARY | {
        "device": f"GPU of {password}", "data": {"source": f"https://ada:{password}@host/set/{token}.parquet"},
        "versions": {"torch": "~/builds/torch-2"},
    }  # fmt: skip
    config = CONFIG.to_yaml().replace("from_pretrained: null", "from_pretrained: /mnt/ada/runs/old")
    folder = folder_of(
        evaluation__json=evaluation(features), training_summary__json=summary, training_config__yaml=config
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"class_names": {"0": token}}))
    unet = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(unet | {"num_class_embeds": 1}))
    plain = card_of(folder).text.replace("\\", "")
    for secret in (token, password, "ada/", "mnt", "builds", "secret place", "/run"):
        assert secret not in plain.replace(REPO_ID, ""), secret
    assert "**Fine-tuned from:** old\n" in plain
    assert "dinov2:dino" in plain


def test_names_are_never_read_as_markup(folder_of: Folder) -> None:
    names = ["<script>alert(1)</script>", "a|b", "`x`", "[y](http://z)", COMMENT, "*\n# *\u202e"]
    folder = folder_of("guided", training_summary__json=SUMMARY | {"data": {"source": "<b>|.parquet"}})
    for file, change in {
        "model_index.json": {"class_names": {str(number): name for number, name in enumerate(names)}},
        "unet/config.json": {"num_class_embeds": 7},
    }.items():
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | change))
    text = card_of(folder).text
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    assert "<script" not in prose and "<b>" not in prose and "\u202e" not in prose
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;, a\|b, \`x\`, \[y\](http://z)" in prose
    assert re.findall(r"^# .*", body_of(prose), re.M) == ["# tiny-ddpm"]
    assert prose.count(COMMENT) == 1
    assert card_of(folder, text).text == text


def test_training_procedure_is_a_table_of_what_was_used(folder_of: Folder) -> None:
    text = card_of(folder_of()).text
    for row in (
        "`weighting` | min\\_snr", "`optimizer` | adamw", "`learning_rate` | 0.0002", "`train_batch_size` | 128",
        "`ema_decay` | 0.9999", "`mixed_precision` | fp32", "`seed` | 3", "Training steps | 2,000",
        "Images seen | 128,000 (83.8 epochs)", "Final training loss | 0.0312", "Hardware | 2 x NVIDIA H100",
        "Training time | 1 h 2 min",
    ):  # fmt: skip
        assert f"| {row} |\n" in section_of(text, "Training procedure"), row
    assert "class_dropout" not in text
    assert (
        "with 1,003,201 parameters" in text
        and r"squaredcos\_cap\_v2, 10 timesteps" in text
        and r"v\_prediction" in text
    )
    assert "- torch 2.13.0\n- diffusers 0.42.1\n" in section_of(text, "Framework versions")
    assert "fid of 1,000 images: 5.5" in section_of(text, "Evaluation results")


def test_any_part_of_the_summary_may_be_missing(folder_of: Folder) -> None:
    for missing in (*SUMMARY, "data.num_images", "data.source"):
        for is_broken in (False, True):
            summary = json.loads(json.dumps(SUMMARY))
            inside, key = (summary["data"], missing.removeprefix("data.")) if "." in missing else (summary, missing)
            del inside[key]
            if is_broken:
                inside[key] = None if missing == "data.source" else math.nan
            text = card_of(folder_of(training_summary__json=summary)).text
            assert not re.search(r"\bNone\b|\bnan\b|Undefined", text), missing


def test_methods_are_cited_where_they_are_used(folder_of: Folder) -> None:
    def cited(*arguments: Any, **files: Any) -> set[str]:
        return set(re.findall(r"@\w+\{(\w+?\d{4})", card_of(folder_of(*arguments, **files)).text))

    assert cited() == {"ho2020", "nichol2021", "song2021", "salimans2022", "hang2023"}
    assert cited("self_conditioned", bare=True) == {"ho2020", "chen2023"}
    assert cited("guided", bare=True) == {"ho2020", "nichol2021", "ho2022", "lin2024"}


def test_the_templates_are_installed_with_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[3] / "setup.cfg")
    package = Path(card_module.__file__).parent
    assert set(package.glob(setup["options.package_data"]["ddpm_hf.hub"])) == set((package / "templates").iterdir())


# What stays of a card on the Hub


def test_a_generated_card_is_generated_again(folder_of: Folder) -> None:
    first = card_of(folder_of(), license="mit")
    assert first.notes == ()
    assert card_of(folder_of(), first.text) == first
    folder = folder_of("guided", evaluation__json=evaluation(FID))
    edited = first.text.replace("## Limitations", "## Limits").replace("license: mit", "license: mit\nlanguage: no")
    new = card_of(folder, edited.replace("\n", "\r\n"))
    assert body_of(new.text) == body_of(card_of(folder, license="mit").text)
    assert (data_of(new.text)["license"], data_of(new.text)["language"]) == ("mit", "no")
    assert card_of(folder, "").text == card_of(folder, "\ufeff").text == card_of(folder).text


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_without_the_comment_the_text_stays_and_the_metadata_is_updated(folder_of: Folder, line_break: str) -> None:
    old = card_of(folder_of(evaluation__json=evaluation(FID))).text
    mine = old.replace(f"{COMMENT}\n\n", "").replace("## Limitations", "## What I know about its limits")
    mine = mine.replace("license: unknown", "license: cc-by-4.0  # as agreed\nlanguage: no\nthumbnail: me.png")
    mine = mine.replace("\n", line_break)
    better = Metric(**{**FID.__dict__, "value": 2.5})
    new = card_of(folder_of("guided", evaluation__json=evaluation(better, BITS)), mine)
    assert new.text.endswith(mine.split(f"{line_break}---{line_break}", 1)[1])
    assert (data_of(new.text)["license"], data_of(new.text)["language"]) == ("cc-by-4.0", "no")
    assert data_of(new.text)["thumbnail"] == "me.png" and "class-conditional" in data_of(new.text)["tags"]
    assert [(one["type"], one["value"]) for one in metrics_of(new.text)] == [("fid", 2.5), ("bits_per_dim", 4.2)]
    assert new.notes == (
        "README.md was edited on the Hub: its text stays as it is there, only its metadata is updated.",
    )
    assert card_of(folder_of("guided", evaluation__json=evaluation(better, BITS)), new.text) == new


@pytest.mark.parametrize("head", ["", "---\n\"license\": other\n'tags': art\nlanguage: [en, de]\n---\n"])
def test_a_card_without_the_comment_keeps_every_byte_of_its_text(head: str, folder_of: Folder) -> None:
    body = "\n# Mine  \r\n\n\t\n---\n\nthe end"
    new = card_of(folder_of(evaluation__json=evaluation(FID)), head + body)
    assert new.text.endswith(f"---\n{body}")
    data = data_of(new.text)
    assert new.text.count("license") == (1 if head else 0) and new.text.count("tags") == 1
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "unconditional-image-generation")
    assert data.get("license") == ("other" if head else None)
    assert ("art" in data["tags"], data.get("language")) == ((True, ["en", "de"]) if head else (False, None))
    assert data_of(card_of(folder_of(), new.text, license="mit").text)["license"] == "mit"


def test_an_unedited_card_of_version_0_1_is_generated_again(folder_of: Folder) -> None:
    folder = folder_of(evaluation__json=evaluation(FID))
    expected = card_of(folder).text
    assert card_of(folder, CARD_OF_0_1).text == expected
    assert card_of(folder, CARD_OF_0_1.replace("\n", "\r\n")).text == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("## What it is not", "## What it is not!"),
        (r"(<!-- ddpm_hf: end title -->\n)", r"\1\nMy words.\n"),
        (r"\Z", "My words.\n"),
        (r"<!-- ddpm_hf: begin evaluation .*<!-- ddpm_hf: end evaluation -->\n", ""),
        (r"<!-- ddpm_hf: end evaluation -->\n", ""),
        (r"(begin evaluation) sha256=\w+", r"\1"),
    ],
)
def test_an_edited_card_of_version_0_1_keeps_its_text(old: str, new: str, folder_of: Folder) -> None:
    edited = re.sub(old, new, CARD_OF_0_1, count=1, flags=re.S)
    assert edited != CARD_OF_0_1
    kept = card_of(folder_of(evaluation__json=evaluation(FID)), edited)
    assert body_of(kept.text) == body_of(edited)
    assert len(metrics_of(kept.text)) == 1


def test_results_of_others_stay_and_ours_are_replaced(folder_of: Folder) -> None:
    folder = folder_of(evaluation__json=evaluation(FID))
    head = yaml.safe_load(card_of(folder).text.split("---\n")[1])
    theirs = {"type": "fid", "value": 9.0, "name": "FID by Eve"}
    head["model-index"][0]["results"][0]["metrics"].append(theirs)
    for body in (f"\n{COMMENT}\n", "# Mine\n"):
        mine = f"---\n{yaml.safe_dump(head)}---\n{body}"
        other = evaluation(Metric(**{**FID.__dict__, "num_samples": 10_000, "value": 4.0}))
        values = [one["value"] for one in metrics_of(card_of(folder_of(evaluation__json=other), mine).text)]
        assert values == [9.0, 4.0]
        without = card_of(folder_of(), mine).text
        assert metrics_of(without) == [theirs]
        assert data_of(without)["metrics"] == ["fid"]
    without = card_of(folder_of(), card_of(folder).text).text
    assert not {"model-index", "metrics"} & data_of(without).keys()


def test_a_license_stays_until_another_is_given(folder_of: Folder) -> None:
    text = card_of(folder_of(), card_of(folder_of(), license="mit").text).text
    assert data_of(text)["license"] == "mit"
    assert "**License:** mit\n" in text
    text = card_of(folder_of(), text, license="apache-2.0").text
    assert data_of(text)["license"] == "apache-2.0"
    assert "license" in " ".join(card_of(folder_of()).notes)


def test_a_license_of_another_name_is_shown(folder_of: Folder) -> None:
    mine = card_of(folder_of()).text.replace("license: unknown", "license: other\nlicense_name: My *own*")
    assert r"**License:** My \*own\*" in card_of(folder_of(), mine).text


@pytest.mark.parametrize(
    "head",
    ["license: [mit", "- a\n- b", "model-index: 3", "model-index:\n- name: x", "model-index:\n- name: a\n- name: b"],
)
def test_metadata_that_cannot_be_read_stays(head: str, folder_of: Folder) -> None:
    new = card_of(folder_of(evaluation__json=evaluation(FID)), f"---\n{head}\n---\n# Mine\n")
    assert new.text == f"---\n{head}\n---\n# Mine\n"
    assert "cannot be read" in new.notes[0]


LINES = st.sampled_from([
    "---", "license: mit", "tags:", "- a", "", "<!-- ddpm_hf: begin title -->", "<!-- ddpm_hf: end title -->",
    "<!-- ddpm_hf: begin usage sha256=" + "0" * 64 + " -->", "# ddpm_hf wrote: {}", "```", "<!--", "\u2028x", "\x0c",
    "mine: [", "# comment", "model-index:", COMMENT,
])  # fmt: skip


@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(LINES, max_size=10), line_break=st.sampled_from(["\n", "\r\n"]))
def test_no_text_of_an_edited_card_is_ever_lost(lines: list[str], line_break: str, pipelines: Path) -> None:
    body = line_break.join(["# Mine", *lines])
    assert card_of(pipelines / "plain", body).text.endswith(body)
    head = [line for line in lines if line != COMMENT]
    with_head = line_break.join(["---", *head, "---", "# Mine"])
    assert "# Mine" in card_of(pipelines / "plain", with_head).text
