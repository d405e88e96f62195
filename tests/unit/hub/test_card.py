"""A card says what the folder holds, its code runs, and nothing that somebody wrote in it is ever lost."""

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
from diffusers.utils.hub_utils import MODEL_CARD_TEMPLATE_PATH
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm_hf.cli.evaluate import parse
from ddpm_hf.config import DataConfig, DiffusionConfig, EvaluationConfig, ObjectiveConfig, RunConfig, TrainingConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.evaluation.generate import Sampler, settings_of
from ddpm_hf.evaluation.metrics import Metric
from ddpm_hf.evaluation.report import as_json
from ddpm_hf.hub import card_evaluation
from ddpm_hf.hub.card import Card, make_card
from ddpm_hf.hub.card_text import Code, _shown
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
    training=TrainingConfig(output_dir="/mnt/ada/secret place/run", seed=3),
    evaluation=EvaluationConfig(num_inference_steps=3, eta=0.0),
)
NATIVE_ONLY = ("guided", "self_conditioned", "learned")

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved pipelines of four kinds; the chain of the one that stock classes sample from whole is short."""
    folder = tmp_path_factory.mktemp("pipelines")
    scheduler = GaussianDiffusionScheduler.create(num_train_timesteps=10, beta_schedule="cosine", prediction_type="v")
    GaussianDiffusionPipeline(tiny_unet(), scheduler).save_pretrained(folder / "plain")
    for name in NATIVE_ONLY:
        make_pipeline(name).save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder_of(pipelines: Path, tmp_path: Path) -> Folder:
    """Returns a function that assembles a folder: a pipeline, the files of a run, and changes to them."""

    def assemble(name: str = "plain", *, bare: bool = False, **files: Any) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(pipelines / name, folder)
        contents = {} if bare else {"training_config.yaml": CONFIG.to_yaml(), "training_summary.json": SUMMARY}
        for file, content in (contents | {name.replace("__", "."): file for name, file in files.items()}).items():
            (folder / file).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return folder

    return assemble


def evaluation(*metrics: Metric, **data: Any) -> str:
    """Returns evaluation.json as `ddpm-hf evaluate` writes it."""
    return as_json(metrics, None, settings=SAMPLING, data=DATA | data, bound_settings=BOUND)


def card_of(folder: Path, existing: str | None = None, **arguments: Any) -> Card:
    return make_card(folder, repo_id=REPO_ID, existing=existing, **arguments)


def data_of(text: str) -> dict[str, Any]:
    """Returns the metadata as huggingface_hub reads it."""
    return dict(ModelCard(text).data.to_dict())


def section_of(text: str, name: str) -> str:
    found = re.search(rf"<!-- ddpm_hf: begin {name} sha256=\w+ -->\n(.*?)<!-- ddpm_hf: end {name} -->\n", text, re.S)
    assert found is not None
    return found[0]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


# What a card says.


@pytest.mark.parametrize(
    ("name", "num_ways", "labels"),
    [("plain", 3, None), ("guided", 2, '["cat", "dog"]'), ("self_conditioned", 2, None), ("learned", 2, None)],
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
        assert REPO_ID in block
        names: dict[str, Any] = {}
        torch.manual_seed(0)
        exec(block.replace(REPO_ID, str(folder)), names)  # noqa: S102
        assert (tmp_path / "first.png").is_file()
        (tmp_path / "first.png").unlink()
        drawn.append([image.tobytes() for image in names["images"]])
        assert (f"class_labels={labels}" in block) == (labels is not None)
    assert len(drawn[-1]) == (2 if labels else 4)
    assert drawn[-1] == drawn[-2]


def test_the_code_draws_as_the_pictures_of_the_run_were_drawn(folder_of: Folder) -> None:
    stock, *native = code_blocks(card_of(folder_of()).text)
    assert "pipeline(batch_size=4, num_inference_steps=10).images" in stock
    assert all("num_inference_steps=3, eta=0.0)" in block for block in native)
    assert "pipeline(batch_size=4).images" in code_blocks(card_of(folder_of(bare=True)).text)[1]


def test_the_card_says_when_half_precision_weights_make_a_network_of_half_precision(tmp_path: Path) -> None:
    pipeline = make_pipeline("plain")
    pipeline.save_pretrained(tmp_path)
    pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert "only with `dtype=torch.float16` beside it does the network compute in half" in card_of(tmp_path).text
    load = GaussianDiffusionPipeline.from_pretrained
    assert load(tmp_path, variant="fp16").unet.dtype == torch.float32
    assert load(tmp_path, variant="fp16", dtype=torch.float16).unet.dtype == torch.float16


def test_weights_that_exist_as_a_variant_only_are_asked_for(folder_of: Folder) -> None:
    folder = folder_of()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert all('variant="fp16"' in block for block in code_blocks(card_of(folder).text))
    shutil.copy(weights.with_name("diffusion_pytorch_model.fp16.safetensors"), weights)
    text = card_of(folder).text
    assert not any("variant" in block for block in code_blocks(text))
    assert '`variant="fp16"` in any `from_pretrained` downloads the weights rounded to half precision' in text
    assert "half precision" not in card_of(folder_of()).text


def test_metadata_is_what_the_hub_reads(folder_of: Folder) -> None:
    data = data_of(card_of(folder_of("guided", evaluation__json=evaluation(FID, BITS))).text)
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "unconditional-image-generation")
    assert data["license"] == "unknown"
    assert {"ddpm", "diffusers", "diffusers-training", "ddpm_hf", "pytorch", "class-conditional"} <= set(data["tags"])
    assert data["metrics"] == ["fid", "bits_per_dim"]
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert model["name"] == "tiny-ddpm"
    assert result["dataset"] == {"name": "digits.parquet", "type": "digits.parquet", "split": "train"}
    fid, bits = result["metrics"]
    assert (fid["type"], fid["value"], fid["name"]) == ("fid", 3.25, "FID-50k (Inception)")
    assert fid["args"] == {
        "standard_error": 0.04, "num_samples": 50_000, "num_reference": 1527, "features": INCEPTION, "seed": 7,
        "sampler": "GaussianDiffusionScheduler", "num_inference_steps": 50, "eta": 0.0, "guidance_scale": 1.0,
        "timestep_spacing": "trailing", "dtype": "float32", "device": "cuda",
    }  # fmt: skip
    assert bits["args"] == {"num_samples": 270, "seed": 7, **BOUND}
    other = data_of(card_of(folder_of(evaluation__json=evaluation(FID, source="eve/test-set"))).text)
    assert other["model-index"][0]["results"][0]["dataset"]["type"] == "eve/test-set"
    plain = data_of(card_of(folder_of(), license="apache-2.0").text)
    assert plain["license"] == "apache-2.0"
    assert "class-conditional" not in plain["tags"]
    assert not {"model-index", "metrics", "datasets"} & set(plain)


def test_text_of_the_metadata_is_read_back_as_it_was_written(folder_of: Folder) -> None:
    text = card_of(folder_of(evaluation__json=evaluation(FID, BITS))).text
    card = ModelCard(text)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert ModelCardData(**yaml.safe_load(text.split("---\n")[1])).to_dict() == card.data.to_dict()


def test_what_is_no_number_is_left_out_and_said(folder_of: Folder) -> None:
    bad = Metric(**{**FID.__dict__, "value": math.nan})
    kid = Metric(**{**FID.__dict__, "name": "kid", "standard_error": math.nan})
    text = card_of(folder_of(evaluation__json=evaluation(bad, kid))).text
    (metric,) = data_of(text)["model-index"][0]["results"][0]["metrics"]
    assert metric["type"] == "kid"
    assert "standard_error" not in metric["args"]
    assert "FID-50k (Inception) came out as no number" in text
    assert "nan" not in text


def test_numbers_are_told_with_their_errors_and_how_they_were_measured(folder_of: Folder) -> None:
    text = section_of(card_of(folder_of(evaluation__json=evaluation(FID, BITS))).text, "evaluation")
    assert "| FID-50k (Inception) | 3.25 | 0.04 | lower | 1,527 |" in text
    assert "| bits per dimension of 270 images | 4.2 |  | lower |  |" in text
    assert "50 steps with GaussianDiffusionScheduler, eta 0, from seed 7, in float32 on cuda, ddpm\\_hf " in text


def test_the_command_to_measure_again_is_one_that_evaluate_reads(folder_of: Folder) -> None:
    content = json.loads(evaluation(FID, BITS))
    content["sampling"] |= {"guidance_scale": 2.0, "guidance_rescale": 0.5}
    text = card_of(folder_of(evaluation__json=json.dumps(content))).text
    (line,) = re.findall(r"^ddpm-hf evaluate .*$", text, re.M)
    options = parse(shlex.split(line)[2:])
    assert (options.folder, options.data, options.data_validation_fraction) == (REPO_ID, "digits.parquet", 0.15)
    assert (options.metrics, options.num_samples, options.seed) == (["fid", "bits_per_dim"], 50_000, 7)
    assert (options.split_seed, options.num_images, options.num_terms) == (3, 270, 50)
    assert (options.num_inference_steps, options.eta, options.scheduler) == (50, 0.0, None)
    assert (options.guidance_scale, options.guidance_rescale) == (2.0, 0.5)


def test_no_setting_of_the_sampling_is_left_out_of_the_command(folder_of: Folder) -> None:
    """Each that is not the default; those without a flag say what was measured, and not how."""
    changed = {
        "seed": 9, "scheduler": "DDIMScheduler", "num_inference_steps": 4, "eta": 0.5, "timestep_spacing": "linspace",
        "guidance_scale": 2.0, "guidance_rescale": 0.5, "labels": [1, 0, 1], "dtype": "bfloat16", "device": "cpu",
    }  # fmt: skip
    pipeline = make_pipeline("guided")
    named = {"schema_version", "pipeline", "analytic_variance", *changed}
    assert set(settings_of(pipeline, Sampler(), 0)) == named

    def options(**sampling: Any) -> dict[str, Any]:
        content = as_json([FID], None, settings=SAMPLING | sampling, data=DATA, bound_settings=BOUND)
        text = card_of(folder_of("guided", evaluation__json=content)).text
        (line,) = re.findall(r"^ddpm-hf evaluate .*$", text, re.M)
        return vars(parse(shlex.split(line)[2:]))

    expected = changed | {"labels": "1,0,1", "cpu": True}
    told = options(**changed)
    for name in expected.keys() - {"device"}:
        assert told[name] == expected[name], name
    assert options(analytic_variance=True)["variance"] == "analytic"
    assert options(labels=list(range(pipeline.num_classes)))["labels"] is None


def test_bits_per_dimension_say_of_which_images_and_given_what(folder_of: Folder) -> None:
    def title(*folder: str, **bound: Any) -> tuple[str, str]:
        content = as_json([BITS], None, settings=SAMPLING, data=DATA, bound_settings=BOUND | bound)
        text = card_of(folder_of(*folder, evaluation__json=content)).text
        metric = data_of(text)["model-index"][0]["results"][0]["metrics"][0]
        return metric["name"], section_of(text, "evaluation")

    name, text = title()
    assert name == "bits per dimension of 270 images"
    assert "of 270 images that were held out of training, over 1,000 steps" in text
    name, text = title(images="all", conditional=True)
    assert name == "bits per dimension of 270 training images, given the class"
    assert "of 270 training images, on which it may be lower than on others, given the class of each, over" in text
    assert "held out of training, given the class of each" in title("guided")[1]


@pytest.mark.parametrize(
    "content",
    [
        "{", "[1]", "null", "{}", '{"recognised": 0.99}', '{"schema_version": 2, "metrics": []}',
        '{"schema_version": 1}', '{"schema_version": 1, "metrics": [{"name": "fid"}]}',
        '{"schema_version": 1, "metrics": [{"name": "fid", "value": "low", "num_samples": 5}]}',
        '{"schema_version": 1, "metrics": [{"name": "a b", "value": 1, "num_samples": 5}]}',
        '{"schema_version": 1, "metrics": 3}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_broken_or_foreign_evaluation_is_refused_in_one_sentence(content: str, folder_of: Folder) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.json .*; (measure|write it) anew.*, or take .*\.$"):
        card_of(folder_of(evaluation__json=content))


def test_what_is_no_folder_name_or_license_is_refused(folder_of: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pipeline"):
        card_of(tmp_path)
    with pytest.raises(ValueError, match="Repo id"):
        make_card(folder_of(), repo_id="a/b/c")
    with pytest.raises(ValueError, match=r"license is 'Apache License 2\.0'; give an identifier"):
        card_of(folder_of(), license="Apache License 2.0")


@pytest.mark.parametrize(
    ("source", "shown", "is_id"),
    [
        ("uoft-cs/cifar10", "uoft-cs/cifar10", True),
        ("digits.parquet", "digits.parquet", False),
        ("data/digits.parquet", "digits.parquet", False),
        ("/mnt/ada/photos", "photos", False),
        ("C:\\Users\\ada\\photos\\", "photos", False),
        ("a/b/c", "c", False),
    ],
)
def test_only_an_id_of_the_hub_is_listed_as_a_data_set(source: str, shown: str, is_id: bool, folder_of: Folder) -> None:
    text = card_of(folder_of(training_summary__json=SUMMARY | {"data": {"source": source}})).text
    assert data_of(text).get("datasets") == ([source] if is_id else None)
    assert f"images of {f'[{shown}](https://huggingface.co/datasets/{shown})' if is_id else shown} that" in text


def test_a_relative_path_in_the_configuration_is_not_taken_for_an_id(folder_of: Folder) -> None:
    def data(**changes: Any) -> dict[str, Any]:
        config = RunConfig(data=DataConfig(**changes)).to_yaml()
        return data_of(card_of(folder_of(bare=True, training_config__yaml=config)).text)

    assert "datasets" not in data(source="private/photos")
    assert data(source="ada/photos", revision="main")["datasets"] == ["ada/photos"]


def test_no_secret_and_no_local_path_is_told(folder_of: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
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
    text = card_of(folder).text
    plain = text.replace("\\", "")
    for secret in (token, password, "ada/", "mnt", "builds", "secret place", "/run"):
        assert secret not in plain.replace(REPO_ID, ""), secret
    assert "weights of old" in plain
    assert "dinov2:dino" in plain


def test_names_are_read_as_names_and_never_as_markup(folder_of: Folder) -> None:
    names = ["<script>alert(1)</script>", "a|b", "`x`", "[y](http://z)", "<!-- ddpm_hf: end title -->", "*\n# *"]
    folder = folder_of("guided", training_summary__json=SUMMARY | {"data": {"source": "<b>|.parquet"}})
    for file, change in {
        "model_index.json": {"class_names": {str(number): name for number, name in enumerate(names)}},
        "unet/config.json": {"num_class_embeds": 7},
    }.items():
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | change))
    text = card_of(folder).text
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    assert "<script" not in prose
    assert "<b>" not in prose
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;, a\|b, \`x\`, \[y\](http://z)" in prose
    assert re.findall(r"^#+ .*", prose.split("\n---\n")[1], re.M)[0] == "# tiny-ddpm"
    assert text.count("<!-- ddpm_hf: end title -->\n") == 1
    assert card_of(folder, text).text == text


def test_only_what_the_folder_holds_is_shown(folder_of: Folder) -> None:
    folder = folder_of()
    (folder / "samples").mkdir()
    assert "](samples/" not in card_of(folder).text
    assert "ddpm-hf verify" not in card_of(folder).text
    names = ["samples.png", "denoising.png", "denoising.gif", "loss.png", "schedule.png"]
    for name in [*names, "evaluation.png"]:
        (folder / "samples" / name).touch()
    (folder / "verification.json").write_text("{}")
    (folder / "evaluation.json").write_text(evaluation(FID))
    text = card_of(folder).text
    assert sorted(re.findall(r"\]\(samples/(.*?)\)", text)) == sorted([*names, "evaluation.png"])
    assert f"ddpm-hf verify {REPO_ID}" in text


def test_training_is_told_in_numbers(folder_of: Folder) -> None:
    text = section_of(card_of(folder_of()).text, "training")
    for words in (
        "2,000 updates, in which it saw 128,000 images (each of the 1,527 about 84 times); they took 1 h 2 min on "
        "2 x NVIDIA H100.",
        "1,003,201 parameters", "loss ended at 0.0312", "fid of 1,000 images: 5.5", "in 10 steps", "cosine",
        "the velocity v", "| weighting of the loss | min\\_snr |", "| seed | 3 |", "torch 2.13.0, diffusers 0.42.1",
    ):  # fmt: skip
        assert words in text, words
    assert "label dropout" not in text


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (128, "it saw 128 images (8.38 % of the 1,527 there are); they took"),
        (1527, "it saw 1,527 images (each of the 1,527 about once); they took"),
    ],
)
def test_a_training_of_less_than_an_epoch_is_told_as_such(seen: int, words: str, folder_of: Folder) -> None:
    assert words in card_of(folder_of(training_summary__json=SUMMARY | {"num_images_seen": seen})).text


@pytest.mark.parametrize("missing", [*SUMMARY, "data.num_images", "data.source"])
@pytest.mark.parametrize("broken", [False, True])
def test_any_part_of_the_summary_may_be_missing(missing: str, broken: bool, folder_of: Folder) -> None:
    summary = json.loads(json.dumps(SUMMARY))
    inside, key = (summary["data"], missing.removeprefix("data.")) if "." in missing else (summary, missing)
    if broken:
        inside[key] = None if missing == "data.source" else math.nan
    else:
        del inside[key]
    text = card_of(folder_of(training_summary__json=summary)).text
    assert not re.search(r"\bNone\b|\bnan\b|Undefined", text)


def test_a_pipeline_alone_has_a_card(folder_of: Folder) -> None:
    text = card_of(folder_of(bare=True)).text
    assert "Nobody has measured it yet" in text
    assert "not stated. Ask" in text
    assert not re.search(r"\bNone\b|\bnan\b|Undefined", text)


def test_ideas_are_credited_where_they_are_used_and_only_there(folder_of: Folder) -> None:
    def cited(*arguments: Any, **files: Any) -> set[str]:
        return set(re.findall(r"@\w+\{(\w+?\d{4})", card_of(folder_of(*arguments, **files)).text))

    assert cited() == {"ho2020", "nichol2021", "song2021", "salimans2022", "hang2023"}
    assert cited("self_conditioned", bare=True) == {"ho2020", "chen2023"}
    assert cited("guided", bare=True) == {"ho2020", "nichol2021", "ho2022", "lin2024"}


def test_the_template_travels_with_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[3] / "setup.cfg")
    package = Path(card_evaluation.__file__).parent
    shipped = set(package.glob(setup["options.package_data"]["ddpm_hf.hub"]))
    assert shipped == set((package / "templates").iterdir())
    assert shipped


# What of a card stays.


def test_the_same_folder_gives_the_same_card(folder_of: Folder) -> None:
    folder = folder_of(evaluation__json=evaluation(FID))
    first = card_of(folder, license="mit")
    assert card_of(folder, first.text) == first
    assert first.kept == ()


def test_sections_are_renewed_unless_somebody_edited_them(folder_of: Folder) -> None:
    old = card_of(folder_of()).text
    mine = old.replace("## What it is not", "## What it is not!").replace("## Cite", "My own words.\n\n## Cite")
    mine = mine.replace("<!-- ddpm_hf: begin usage", "  A line  \n\n<!-- ddpm_hf: begin usage") + "\nlast words"
    new = card_of(folder_of(evaluation__json=evaluation(FID)), mine)
    assert new.kept == ("limits", "citation")
    assert section_of(new.text, "limits") == section_of(mine, "limits")
    assert section_of(new.text, "citation") == section_of(mine, "citation")
    assert "| FID-50k (Inception) |" in section_of(new.text, "evaluation")
    around = r"<!-- ddpm_hf: begin evaluation .*?end evaluation -->\n"
    body, before = (re.sub(around, "", text.split("\n---\n", 1)[1], flags=re.S) for text in (new.text, mine))
    assert body == before


def test_a_section_that_was_taken_out_stays_out(folder_of: Folder) -> None:
    text = card_of(folder_of()).text
    mine = text.replace(section_of(text, "evaluation"), "")
    new = card_of(folder_of(evaluation__json=evaluation(FID)), mine)
    assert "FID" not in new.text.split("\n---\n", 1)[1]
    assert new.kept == ()


def test_a_card_with_windows_line_breaks_keeps_them(folder_of: Folder) -> None:
    mine = card_of(folder_of()).text.replace("\n", "\r\n") + "mine\r\n"
    assert card_of(folder_of(), mine).text == mine
    new = card_of(folder_of(evaluation__json=evaluation(FID)), mine)
    assert "FID-50k" in new.text
    assert "\n" not in new.text.replace("\r\n", "")
    assert new.kept == ()
    assert data_of(new.text)["metrics"] == ["fid"]


@pytest.mark.parametrize(
    ("mark", "replacement"),
    [
        (r"<!-- ddpm_hf: end evaluation -->\n", ""),
        (r"<!-- ddpm_hf: begin evaluation .*-->\n", ""),
        (r"(<!-- ddpm_hf: begin evaluation) .*-->\n", r"\1 -->\n"),
        (r"(<!-- ddpm_hf: begin evaluation sha256=)\w+", r"\g<1>" + "0" * 64),
        (r"<!-- ddpm_hf: end evaluation -->\n", "<!-- ddpm_hf: end usage -->\n"),
    ],
)
def test_broken_marks_make_a_section_somebodys(mark: str, replacement: str, folder_of: Folder) -> None:
    old = card_of(folder_of()).text
    mine = re.sub(mark, replacement, old)
    assert mine != old
    new = card_of(folder_of(evaluation__json=evaluation(FID)), mine)
    assert "evaluation" in new.kept
    assert new.text.split("\n---\n", 1)[1] == mine.split("\n---\n", 1)[1]


def edit_front(text: str, edit: Callable[[str], str]) -> str:
    head, body = text.split("\n---\n", 1)
    return f"{edit(head)}\n---\n{body}"


def test_metadata_that_somebody_changed_or_added_stays(folder_of: Folder) -> None:
    old = card_of(folder_of(evaluation__json=evaluation(FID))).text

    def edit(head: str) -> str:
        head = head.replace("license: unknown", "license: cc-by-4.0  # asked Bob")
        head = head.replace("pipeline_tag: unconditional-image-generation\n", "")
        return head.replace("- pytorch\n", "- mine  # for fun\n") + "\n# my languages\nlanguage:\n- en"

    mine = edit_front(old, edit)
    better = Metric(**{**FID.__dict__, "value": 2.5})
    new = card_of(folder_of("guided", evaluation__json=evaluation(better, BITS)), mine)
    data = data_of(new.text)
    assert (data["license"], data["language"], new.kept) == ("cc-by-4.0", ["en"], ())
    assert "mine" in data["tags"]
    assert "class-conditional" in data["tags"]
    assert "pytorch" not in data["tags"]
    assert "pipeline_tag" not in data
    assert "# for fun\n" in new.text
    assert "license: cc-by-4.0  # asked Bob\n" in new.text
    assert "# my languages\nlanguage:\n- en\n" in new.text
    metrics = data["model-index"][0]["results"][0]["metrics"]
    assert [(one["type"], one["value"]) for one in metrics] == [("fid", 2.5), ("bits_per_dim", 4.2)]
    assert "cc-by-4.0" in section_of(new.text, "limits")
    refused = card_of(folder_of(), new.text, license="mit")
    assert data_of(refused.text)["license"] == "cc-by-4.0"
    assert refused.kept == ("license",)


def test_a_license_given_once_stays_until_another_is_given(folder_of: Folder) -> None:
    text = card_of(folder_of(), license="mit").text
    text = card_of(folder_of(), text).text
    assert data_of(text)["license"] == "mit"
    assert data_of(card_of(folder_of(), text, license="apache-2.0").text)["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("further", "shown"),
    [
        ("license_name: my-rail\nlicense_link: LICENSE.md", "[my-rail](LICENSE.md)"),
        ("license_name: My *own* one\nlicense_link: https://a.org/b?c=1", r"[My \*own\* one](https://a.org/b?c=1)"),
        ("license_name: my-rail", "my-rail"),
        ("license_name: x\nlicense_link: javascript:alert(1)", "x"),
        ("license_link: LICENSE", "[other](LICENSE)"),
        ("", "other"),
    ],
)
def test_a_license_that_the_hub_does_not_know_has_its_name_and_link(
    folder_of: Folder, further: str, shown: str
) -> None:
    mine = edit_front(
        card_of(folder_of()).text, lambda head: head.replace("license: unknown", f"license: other\n{further}")
    )
    new = card_of(folder_of(), mine)
    assert f"**License of the weights:** {shown}.\n" in section_of(new.text, "limits")
    assert card_of(folder_of(), new.text).text == new.text


def test_numbers_of_others_stay_and_stale_ones_of_ours_go(folder_of: Folder) -> None:
    folder = folder_of(evaluation__json=evaluation(FID))
    text = card_of(folder).text
    theirs = {"type": "fid", "value": 9.0, "name": "FID by Eve"}
    head = yaml.safe_load(text.split("---\n")[1])
    head["model-index"][0]["results"][0]["metrics"].append(theirs)
    record = re.search(r"^# ddpm_hf wrote: .*\n", text, re.M)
    assert record is not None
    mine = f"---\n{yaml.safe_dump(head)}{record[0]}---\n{text.split('---', 2)[2].removeprefix(chr(10))}"
    unmeasured = card_of(folder_of(), mine).text
    assert data_of(unmeasured)["model-index"][0]["results"][0]["metrics"] == [theirs]
    results = data_of(card_of(folder, unmeasured).text)["model-index"][0]["results"]
    assert [one["value"] for result in results for one in result["metrics"]] == [9.0, 3.25]
    # Ours alone come back too, since it was not a person who took them out.
    without = card_of(folder_of(), text).text
    assert "model-index" not in data_of(without)
    assert data_of(card_of(folder, without).text) == data_of(text)


def test_a_number_that_somebody_corrected_stands_for_ours(folder_of: Folder) -> None:
    folder = folder_of(evaluation__json=evaluation(FID))
    mine = edit_front(card_of(folder).text, lambda head: head.replace("value: 3.25", "value: 3.5"))
    metrics = data_of(card_of(folder, mine).text)["model-index"][0]["results"][0]["metrics"]
    assert [one["value"] for one in metrics] == [3.5]


@pytest.mark.parametrize(
    "head", ["license: [mit\n", "- a\n- b\n", "? {a: b}\n: c\n", "{license: mit}\n", "a: 1\na: 2\n"]
)
def test_a_head_that_is_broken_or_strange_stays_as_it_is(head: str, folder_of: Folder) -> None:
    text = card_of(folder_of()).text
    mine = f"---\n{head}---\n{text.split('---', 2)[2].removeprefix(chr(10))}"
    new = card_of(folder_of(), mine)
    assert new.text.startswith(f"---\n{head}---\n")
    assert new.kept[0] == "metadata"


@pytest.mark.parametrize(("value", "further"), [("&one unknown", "other: *one"), ("unknown", "<<: {b: 1}")])
def test_a_head_that_cannot_be_renewed_line_by_line_stays(value: str, further: str, folder_of: Folder) -> None:
    """Without the anchor its alias would mean nothing; merged keys are not those that the lines show."""
    mine = edit_front(
        card_of(folder_of()).text, lambda head: head.replace("license: unknown", f"license: {value}\n{further}")
    )
    new = card_of(folder_of(), mine, license="mit")
    assert new.text.split("\n---\n")[0] == mine.split("\n---\n")[0]
    assert new.kept == ("metadata", "license")


def test_a_card_that_somebody_wrote_alone_keeps_every_byte_of_its_text(folder_of: Folder) -> None:
    body = "\n# Mine  \r\n\nNo marks.\t\n\n---\n\nthe end"
    folder = folder_of(evaluation__json=evaluation(FID))
    new = card_of(folder, f"---\n# a comment\ntags:\n- art\n---\n{body}")
    assert new.text.endswith(f"---\r\n{body}") or new.text.endswith(f"---\n{body}")
    assert new.kept == ("README.md",)
    data = data_of(new.text)
    assert (data["tags"], data["library_name"]) == (["art"], "diffusers")
    assert "license" not in data
    assert "# a comment" in new.text
    (folder / "evaluation.json").write_text(evaluation(Metric(**{**FID.__dict__, "value": 2.0})))
    again = card_of(folder, new.text)
    metrics = data_of(again.text)["model-index"][0]["results"][0]["metrics"]
    assert [one["value"] for one in metrics] == [2.0]
    assert again.text.endswith(body)


def test_a_card_without_a_head_is_given_one(folder_of: Folder) -> None:
    new = card_of(folder_of(), "# Mine\n\nwords")
    assert new.text.endswith("---\n# Mine\n\nwords")
    assert data_of(new.text)["pipeline_tag"] == "unconditional-image-generation"
    assert new.kept == ("README.md",)


@pytest.mark.parametrize(
    "existing", ["---\nlicense: mit\n---\n", "---\nlicense: mit\n---", "\ufeff---\nlicense: mit\n---\n\n"]
)
def test_a_head_without_a_text_is_given_one(existing: str, folder_of: Folder) -> None:
    new = card_of(folder_of(), existing)
    assert data_of(new.text)["license"] == "mit"
    assert "# tiny-ddpm" in new.text
    assert new.kept == ()


def test_what_diffusers_writes_by_itself_is_replaced_unless_somebody_wrote_in_it(folder_of: Folder) -> None:
    sentence = (
        "This is the model card of a 🧨 diffusers pipeline that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    pushed = str(ModelCard.from_template(ModelCardData(library_name="diffusers"), model_description=sentence))
    trained = str(
        ModelCard.from_template(
            ModelCardData(license="mit"), template_path=str(MODEL_CARD_TEMPLATE_PATH), model_description="# X"
        )
    )
    for automatic in (pushed, trained, pushed.replace("\n", "\r\n")):
        new = card_of(folder_of(), automatic)
        assert new.kept == ()
        assert "TODO" not in new.text
        assert "More Information" not in new.text
        assert "# tiny-ddpm" in new.text
    assert data_of(card_of(folder_of(), trained).text)["license"] == "mit"
    for mine in (
        pushed.replace("### Direct Use", "### Direct Use\n\nMy words."),
        trained + "\nMy words.",
        trained.replace("# TODO", "# My words"),
        trained.replace("# X", "# X\n\n# My words"),
    ):
        assert "My words" in mine
        new = card_of(folder_of(), mine)
        assert new.text.endswith(mine.split("\n---\n", 1)[1])
        assert new.kept == ("README.md",)


LINES = st.sampled_from([
    "---", "license: mit", "tags:", "- a", "", "<!-- ddpm_hf: begin title -->", "<!-- ddpm_hf: end title -->",
    "<!-- ddpm_hf: begin usage sha256=" + "0" * 64 + " -->", "<!-- ddpm_hf: end usage -->", "# ddpm_hf wrote: {}",
    "# ddpm_hf wrote: {", "```", "<!--", "\u2028x", "\x0c", "mine: [", "<!-- ddpm_hf: begin -->",
])  # fmt: skip


@settings(
    max_examples=100, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    lines=st.lists(LINES | st.integers(0, 99).map("line {}".format), max_size=12),
    line_break=st.sampled_from("\n \r\n".split(" ")),
)
def test_no_line_that_somebody_wrote_is_ever_lost(lines: list[str], line_break: str, fuzzed: Path) -> None:
    """Nothing in these cards has the hash of ours, so that all of it is somebody's; records alone are renewed."""
    existing = line_break.join(lines)
    new = card_of(fuzzed, existing).text
    ours = re.compile("# ddpm_hf wrote: .*")
    rest = iter([line.rstrip("\r") for line in new.split("\n")])
    for line in existing.split("\n"):
        if line.strip() and not ours.match(line):
            assert line.rstrip("\r") in rest, (line, new)


@pytest.fixture(scope="module")
def fuzzed(pipelines: Path) -> Path:
    return pipelines / "plain"


def test_code_alone_is_shown_as_it_is() -> None:
    assert _shown(Code("a_b <c>")) == "a_b <c>"
    assert _shown("a_b <c>\n\u202ed") == r"a\_b &lt;c&gt; d"
