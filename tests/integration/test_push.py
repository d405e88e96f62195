"""A finished run or a pipeline is published on a Hub, completely or not at all, and without anything private."""

import hashlib
import json
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _http
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm_hf.cli.main import main
from ddpm_hf.config import HubConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.hub import push as hub_push
from ddpm_hf.hub.background import BackgroundPush
from ddpm_hf.hub.push import HubFailed, HubRefused, Target, assemble, check_access, look_up, upload
from ddpm_hf.plots import schedule_plot
from tests import version_0_1
from tests.conftest import REPOSITORY
from tests.documents import blocks
from tests.integration.conftest import SECRET
from tests.loopback_hub import LoopbackHub, files_of
from tests.saved_folders import make_pipeline

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def schedules_are_drawn_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Draw each schedule once: the file depends on the numbers only, and half of the time of a push is spent on it."""
    folder = tmp_path_factory.mktemp("schedules")

    def draw(schedules: Mapping[str, np.ndarray], path: Path) -> None:
        name = hashlib.sha256(b"".join(table.tobytes() for table in schedules.values())).hexdigest()
        if not (folder / name).exists():
            schedule_plot(schedules, folder / name)
        shutil.copyfile(folder / name, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_push, "schedule_plot", draw)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run as training leaves it, with files beside it that must not be published."""
    folder = tmp_path_factory.mktemp("runs") / "birds"
    make_pipeline("plain").save_pretrained(folder / "pipeline")
    for name in ("samples.png", "denoising.png", "denoising.gif", "loss.png"):
        Image.new("L", (8, 8)).save(folder / name)
    (folder / "recognition.json").write_text('{"recognised": 0.9, "recognised_held_out": 0.95, "num_samples": 40}')
    (folder / "pipeline" / "training_config.yaml").write_text(
        f"data:\n  source: {folder}/secret/birds\n  cache_dir: null\ntraining:\n  output_dir: {folder}\n"
    )
    (folder / "pipeline" / "notes.txt").write_text("mine")
    (folder / "pipeline" / "optimizer.safetensors").write_text("mine")
    (folder / "pipeline" / "pipeline.py").write_text("raise SystemExit('foreign code')\n")
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A folder for tests of the upload alone."""
    folder = tmp_path / "assembled"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("# A model\n")
    (folder / WEIGHTS).write_bytes(b"w" * 5000)
    return folder


def branch(hub: LoopbackHub, name: str, revision: str = "main") -> dict[str, bytes]:
    return hub.repositories[name].files(revision)


def send(folder: Path, target: Target) -> tuple[str, bool]:
    return upload(folder, target, look_up(target, check_access(target)), "a push")


# What is published


def test_a_push_publishes_the_files_of_the_list_and_loads_the_pipeline_once(
    hub: LoopbackHub, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded from the run, and what was assembled is loaded to compute its verification.json."""
    loaded, load = [], GaussianDiffusionPipeline.from_pretrained
    monkeypatch.setattr(
        GaussianDiffusionPipeline,
        "from_pretrained",
        lambda path, **options: loaded.append(path) or load(path, **options),
    )
    assert main(["push", str(run), "birds", "--license", "mit", "--fp16"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.endpoint}/user/birds"
    assert len(loaded) == 2
    assert loaded[0] == run / "pipeline"
    files = branch(hub, "user/birds")
    assert set(files) - {name for name in files if name.endswith(".py")} == {
        ".gitattributes", "README.md", "model_index.json", "scheduler/reverse_variance.json",
        "scheduler/scheduler_config.json", "training_config.yaml", "unet/config.json", "verification.json", WEIGHTS,
        "unet/diffusion_pytorch_model.fp16.safetensors", "samples/samples.png", "samples/denoising.png",
        "samples/denoising.gif", "samples/loss.png", "samples/schedule.png", "recognition.json",
    }  # fmt: skip
    assert b"foreign code" not in files["pipeline.py"]
    assert str(run.parent).encode() not in hub.seen
    settings = yaml.safe_load(files["training_config.yaml"])
    assert (settings["data"]["source"], settings["training"]["output_dir"]) == ("birds", "birds")
    card = files["README.md"].decode()
    assert "license: mit" in card and "90.0% of the generated samples" in card


def test_the_code_of_the_document_publishes(
    hub: LoopbackHub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "outputs" / "digits")
    monkeypatch.chdir(tmp_path)
    [code] = [code for code in blocks((REPOSITORY / "docs" / "hub.md").read_text(), "python") if "push(" in code]
    exec(compile(code, "hub.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out == f"{hub.endpoint}/user/digits\n"
    assert b"license: mit" in branch(hub, "user/digits")["README.md"]


def test_a_dry_run_lists_the_files_and_sends_no_request(
    hub: LoopbackHub, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(run), "user/birds", "--dry_run", "--private", "--branch", "next"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith(WEIGHTS) and " kB " in line for line in lines)
    assert "user/birds, branch next (private" in lines[-2]
    assert hub.requests == []


def test_a_second_push_sends_only_what_has_changed(
    hub: LoopbackHub, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["push", str(copied), "birds", "--license", "mit"]
    assert main(command) == 0
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("was up to date; nothing was sent")
    assert len(hub.uploaded) == 1
    Image.new("L", (9, 9)).save(copied / "loss.png")
    assert main(command) == 0
    assert hub.uploaded[-1].files == {"samples/loss.png"}


def test_a_card_edited_on_the_hub_is_kept(hub: LoopbackHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "birds"]) == 0
    files = branch(hub, "user/birds")
    edited = (
        files["README.md"]
        .replace(b"<!-- This model card", b"<!-- My model card")
        .replace(b"license: unknown", b"license: mit")
    )
    assert edited != files["README.md"]
    hub.repositories["user/birds"].commit(files | {"README.md": edited + b"\nAsk me.\n"})
    capsys.readouterr()
    assert main(["push", str(run), "birds"]) == 0
    assert "README.md was edited on the Hub" in capsys.readouterr().out
    assert branch(hub, "user/birds")["README.md"] == edited + b"\nAsk me.\n"


def test_samples_are_drawn_if_there_are_none_and_links_are_not_followed(tmp_path: Path) -> None:
    make_pipeline("labelled").save_pretrained(tmp_path / "pipeline")
    private = tmp_path / "private.png"
    Image.new("L", (8, 8)).save(private)
    (tmp_path / "loss.png").symlink_to(private)
    (tmp_path / "private.json").write_text('{"recognised": 0.9, "num_samples": 1}')
    (tmp_path / "recognition.json").symlink_to(tmp_path / "private.json")
    assemble(tmp_path / "pipeline", tmp_path / "assembled", run=tmp_path)
    assert sorted(path.name for path in (tmp_path / "assembled" / "samples").iterdir()) == [
        "denoising.gif", "denoising.png", "samples.png", "schedule.png",
    ]  # fmt: skip
    assert not (tmp_path / "assembled" / "recognition.json").exists()


def test_a_recognized_share_of_an_earlier_step_is_not_published(copied: Path, tmp_path: Path) -> None:
    for step, is_published in ((4, False), (6, True)):
        recognition = {"recognised": 0.9, "num_samples": 40, "step": step}
        (copied / "recognition.json").write_text(json.dumps(recognition))
        (copied / "pipeline" / "training_summary.json").write_text('{"step": 6}')
        assemble(copied / "pipeline", tmp_path / str(step), run=copied)
        assert (tmp_path / str(step) / "recognition.json").exists() == is_published


def test_real_images_are_published_only_if_asked_for(
    hub: LoopbackHub, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["push", str(copied), "user/birds"]
    assert main([*command, "--with_real_images"]) == 2
    assert "has no evaluation.png" in capsys.readouterr().err
    Image.new("L", (8, 8)).save(copied / "pipeline" / "evaluation.png")
    assert main(command) == 0
    assert "samples/evaluation.png" not in branch(hub, "user/birds")
    assert main([*command, "--with_real_images"]) == 0
    assert "samples/evaluation.png" in branch(hub, "user/birds")
    assert main(command) == 0
    assert "samples/evaluation.png" not in branch(hub, "user/birds")


@pytest.mark.parametrize("is_hub_id", [False, True])
def test_published_records_hold_names_instead_of_paths(
    is_hub_id: bool, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`owner/name` is an id only if the summary or a revision says so, whatever folders there are."""
    (tmp_path / "ada" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    token = "hf_" + "a1B2" * 10
    settings = {
        "data": {"source": "ada/photos", "revision": None, "cache_dir": "private/cache"},
        "model": {"from_pretrained": "ada/old", "config_file": "ada/nets", "revision": "main" if is_hub_id else None},
        "training": {"output_dir": "private/run"},
        "evaluation": {"score_features": "dinov2:/mnt/ada/nets/dino"},
        "hub": {"branch": "experiments/a/b"},
    }
    source = copied / "pipeline"
    (source / "training_config.yaml").write_text(yaml.safe_dump(settings))
    summary = {"device": "/mnt/ada/gpu", "note": token, "loss": float("nan"), "score": {"score": float("inf")}}
    if is_hub_id:
        summary["data"] = {"source": "ada/photos"}
    (source / "training_summary.json").write_text(json.dumps(summary))
    metric = {"name": "frechet_distance[dinov2:/mnt/ada/nets/dino]", "value": 1.0, "num_samples": 2}
    (source / "evaluation.json").write_text(json.dumps({"schema_version": 1, "metrics": [metric]}))
    assemble(source, tmp_path / "target", run=copied)
    sections = yaml.safe_load((tmp_path / "target" / "training_config.yaml").read_text()).values()
    ids = ("ada/photos", "ada/old", "ada/nets") if is_hub_id else ("photos", "old", "nets")
    assert {name: value for section in sections for name, value in section.items()} == {
        "source": ids[0], "from_pretrained": ids[1], "config_file": ids[2], "cache_dir": "cache", "output_dir": "run",
        "score_features": "dinov2:dino", "branch": "experiments/a/b", "revision": "main" if is_hub_id else None,
    }  # fmt: skip
    evaluation = json.loads((tmp_path / "target" / "evaluation.json").read_text())
    assert evaluation["metrics"][0]["name"] == "frechet_distance[dinov2:dino]"
    published = json.loads((tmp_path / "target" / "training_summary.json").read_text())
    assert (published["device"], published["loss"], published["score"]) == ("gpu", None, {"score": None})
    assert token not in published["note"]


def test_weights_that_are_not_finite_are_never_published(
    hub: LoopbackHub, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "pipeline" / WEIGHTS
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = 1e5  # too large for half precision
    save_file(tensors, path, {"format": "pt"})
    assert main(["push", str(copied), "birds", "--fp16"]) == 2
    assert "has weights that are not finite in float16 (conv_in.bias); remove fp16." in capsys.readouterr().err
    tensors["conv_in.bias"][0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    assert main(["push", str(copied), "birds"]) == 2
    assert "has weights that are not finite in float32 (conv_in.bias)" in capsys.readouterr().err
    assert hub.repositories == {}


def test_a_pipeline_that_is_not_what_was_saved_is_not_published(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assemble(copied / "pipeline", tmp_path / "assembled", run=copied)
    tensors = load_file(tmp_path / "assembled" / WEIGHTS)
    tensors["conv_in.weight"] *= 1.5
    save_file(tensors, tmp_path / "assembled" / WEIGHTS, {"format": "pt"})
    assert main(["push", str(tmp_path / "assembled"), "user/birds", "--dry_run"]) == 2
    assert "is not the pipeline that was saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: shutil.rmtree(run / "pipeline"), "holds no pipeline"),
        (lambda run: (run / "pipeline").rename(run / "models"), "holds 1 pipeline, "),
        (lambda run: shutil.rmtree(run), ""),
        (lambda run: (run / "pipeline" / "evaluation.json").write_text("{"), "evaluation.json is not valid JSON"),
        (lambda run: (run / "pipeline" / "evaluation.json").write_text("[]"), "evaluation.json must contain"),
        (lambda run: (run / "pipeline" / "evaluation.json").write_text("{}"), "evaluation.json has schema_version"),
        (lambda run: (run / "pipeline" / "training_config.yaml").write_text("a: ["), "training_config.yaml is not"),
        (lambda run: (run / "recognition.json").write_text("3"), "recognition.json must contain"),
        (lambda run: (run / "loss.png").write_text("<html>"), "loss.png is not a valid PNG or GIF"),
        (lambda run: (run / "pipeline" / WEIGHTS).write_bytes(b"x" * 99), "holds no pipeline that loads"),
    ],
)
def test_a_folder_that_cannot_be_published_gets_a_sentence_and_exit_code_2(
    hub: LoopbackHub, copied: Path, capsys: pytest.CaptureFixture[str], damage: Any, sentence: str
) -> None:
    """And no repository is created."""
    damage(copied)
    assert main(["push", str(copied), "user/birds"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert str(copied) in error
    assert error.count("\n") == 1
    assert hub.repositories == {}


def test_a_push_that_is_stopped_leaves_nothing_behind(
    hub: LoopbackHub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)

    def assemble_and_stop(*arguments: Any, **settings: Any) -> None:
        assemble(*arguments, **settings)
        assert list(tmp_path.glob("ddpm-hf-push-*/*/repository"))  # in the folder of cli.common.temporary_folder
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(hub_push, "assemble", assemble_and_stop)
    assert main(["push", str(run), "birds"]) == 143
    assert "SIGTERM" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
    assert hub.repositories == {}


# Access


def test_a_user_without_write_access_is_told_before_any_work(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repository("user/model").commit({})

    def refusal(**target: Any) -> str:
        with pytest.raises(HubRefused) as caught:
            check_access(Target(**target))
        return str(caught.value)

    monkeypatch.setenv("HF_TOKEN", hub.reader_token)
    assert "you may not write to user/model" in refusal(repo_id="user/model")
    assert "user/new does not exist, and your token cannot create it" in refusal(repo_id="new")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert "somebody/model does not exist, and user cannot create it" in refusal(repo_id="somebody/model")
    assert refusal(repo_id="readers/new").endswith("use a name under org or user.")
    assert "user/new does not exist, so a pull request" in refusal(repo_id="user/new", as_pull_request=True)
    assert check_access(Target(repo_id="org/new")) == "org/new"
    assert check_access(Target(repo_id="new")) == "user/new"
    hub.fine_grained = ["repo.content.read", "repo.write"]
    assert check_access(Target(repo_id="new")) == "user/new"
    hub.fine_grained = ["repo.content.read"]
    assert "user/new does not exist, and your token cannot create it" in refusal(repo_id="new")
    assert "POST /api/repos/create" not in hub.requests
    num_requests = len(hub.requests)
    for token in ("hf_é", "hf_\ta", "hf_\x01a"):
        monkeypatch.setenv("HF_TOKEN", token)
        message = refusal(repo_id="user/model")
        assert "the token contains an invalid character" in message and token not in message
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    assert "you are not logged in to the Hub" in refusal(repo_id="user/model")
    assert len(hub.requests) == num_requests


def test_a_public_repository_is_refused_where_a_private_one_is_asked_for(hub: LoopbackHub) -> None:
    """By a push, and by a training before its first step."""
    hub.repository("user/open").commit({})
    hub.repository("user/hidden").commit({})
    hub.repositories["user/hidden"].private = True
    assert check_access(Target(repo_id="hidden", private=True)) == "user/hidden"
    assert check_access(Target(repo_id="open")) == "user/open"
    with pytest.raises(HubRefused, match="user/open exists and is public"):
        BackgroundPush(HubConfig(push_to_hub=True, repo_id="open", private=True), Path("unused")).check()


def test_offline_mode_is_named_in_the_error(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _http.close_session()
    with pytest.raises(HubFailed, match="HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"):
        check_access(Target(repo_id="user/model"))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("repo_id", ["", "user/", "a/b/c", "user/mo del", "-x", "user/model.git", "../x", "x" * 97]),
        ("branch", ["a..b", "-x", "a b", "a/", "", "a.lock", "a.lock/b", "a.", "a/.b", "HEAD"]),
        ("license", ["MIT License", "", "MIT"]),
    ],
)
def test_a_malformed_value_is_refused(name: str, values: list[str]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=r"Repo.id|is not a valid|license is"):
            Target(**{"repo_id": "user/model"} | {name: value})  # type: ignore[arg-type]
    with pytest.raises(HubRefused, match="a pull request has its own branch"):
        Target(repo_id="user/model", branch="next", as_pull_request=True)


def test_the_token_is_in_its_header_only(hub: LoopbackHub, copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not in what is sent, printed or written, also if the Hub repeats it in an error; and no option takes one."""
    assert main(["push", str(copied), "birds"]) == 0
    hub.fail("/commit/", 500, times=20)
    Image.new("L", (9, 9)).save(copied / "loss.png")
    assert main(["push", str(copied), "birds"]) == 1
    with pytest.raises(SystemExit):
        main(["push", "x", "y", "--token", SECRET])
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert SECRET.encode() not in hub.seen
    assert not any(SECRET.encode() in content for content in files_of(copied.parent).values())


# Upload


def test_private_branch_and_pull_request_do_what_they_say(hub: LoopbackHub, text_folder: Path) -> None:
    send(text_folder, Target(repo_id="hidden", private=True))
    assert hub.repositories["user/hidden"].private
    assert send(text_folder, Target(repo_id="user/new", branch="main")) == (f"{hub.endpoint}/user/new/tree/main", True)
    assert send(text_folder, Target(repo_id="user/new", branch="main"))[1] is False
    url, _ = send(text_folder, Target(repo_id="user/open", branch="experiments/1"))
    assert url == f"{hub.endpoint}/user/open/tree/experiments/1"
    assert not hub.repositories["user/open"].private
    assert "README.md" in branch(hub, "user/open", "experiments/1")
    assert "README.md" not in branch(hub, "user/open")
    (text_folder / "README.md").write_text("# A better model\n")
    url, _ = send(text_folder, Target(repo_id="user/open", as_pull_request=True))
    assert url == f"{hub.endpoint}/user/open/discussions/1"
    assert branch(hub, "user/open", "refs/pr/1")["README.md"] == b"# A better model\n"
    assert "README.md" not in branch(hub, "user/open")


def test_files_of_an_earlier_push_are_removed_and_files_of_others_stay(hub: LoopbackHub, text_folder: Path) -> None:
    theirs = {"LICENSE": b"mit", "demo.py": b"x", "samples/mine.png": b"x", "unet/README": b"x", "sampling.py": b"x"}
    ours = {
        "unet/diffusion_pytorch_model.fp16.safetensors": b"old", "samples/loss.png": b"old", "evaluation.json": b"{}",
        "recognition.json": b"{}",
    }  # fmt: skip
    hub.repository("user/model").commit(theirs | ours)
    send(text_folder, Target(repo_id="user/model"))
    assert branch(hub, "user/model") == files_of(text_folder) | theirs
    code = {path.name: path.read_bytes() for path in version_0_1.SAVED.rglob("*.py")}
    hub.repositories["user/model"].commit(code | {"demo.py": b"x"})
    (text_folder / "pipeline.py").write_text("new")
    send(text_folder, Target(repo_id="user/model"))
    left = {"editing.py", "gaussian.py", "images.py", "scheduler.py", "pipeline.py", "demo.py"}  # a push replaces these
    assert {name for name in branch(hub, "user/model") if name.endswith(".py")} == left


FAILURES = [
    ("/auth-check", 401, HubRefused, "the Hub does not accept your token"),
    ("/preupload/", 403, HubRefused, "you may not write to user/model"),
    ("/commit/", 409, HubRefused, "has changed in the meantime"),
    ("/commit/", 500, HubFailed, "the Hub had an error"),
    ("objects/batch", 500, HubFailed, "the Hub had an error"),
    ("PUT ", 500, HubFailed, "the Hub had an error"),
    ("whoami", "cut", HubFailed, "the Hub could not be reached"),
    ("PUT ", "cut", HubFailed, "the Hub could not be reached"),
    ("/commit/", "cut", HubFailed, "the Hub could not be reached"),
]


@pytest.mark.parametrize(("request_", "status", "kind", "sentence"), FAILURES)
def test_an_error_of_the_hub_becomes_a_sentence_and_nothing_is_half_published(
    hub: LoopbackHub, text_folder: Path, request_: str, status: Any, kind: type[Exception], sentence: str
) -> None:
    """Whatever the client retries; the next push succeeds."""
    before = {"README.md": b"before"}
    hub.repository("user/model").commit(before)
    hub.fail(request_, status, times=20)
    with pytest.raises(kind) as caught:
        send(text_folder, Target(repo_id="user/model"))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert branch(hub, "user/model") == before
    hub.end_failures()
    send(text_folder, Target(repo_id="user/model"))
    assert branch(hub, "user/model") == files_of(text_folder)


def test_a_push_whose_answer_is_lost_is_not_said_to_be_undone(hub: LoopbackHub, text_folder: Path) -> None:
    hub.fail("/commit/", "lost", times=20)
    with pytest.raises((HubFailed, HubRefused)) as caught:
        send(text_folder, Target(repo_id="user/model"))
    assert "nothing was published" not in str(caught.value)
    assert branch(hub, "user/model").items() >= files_of(text_folder).items()


@pytest.mark.parametrize("case", ["changed", "new repository", "new branch"])
def test_a_change_between_looking_and_pushing_is_not_overwritten(
    hub: LoopbackHub, text_folder: Path, case: str
) -> None:
    target = Target(repo_id="user/model", branch="next" if case == "new branch" else None)
    if case != "new repository":
        hub.repository("user/model").commit({"README.md": b"# main"})
    remote = look_up(target, "user/model")
    theirs = {"README.md": b"# Made in between\n"}
    hub.repository("user/model").commit(theirs, target.revision)
    with pytest.raises(HubRefused, match="has changed in the meantime"):
        upload(text_folder, target, remote, "a push")
    assert branch(hub, "user/model", target.revision) == theirs


def test_a_new_branch_starts_with_the_card_of_main(hub: LoopbackHub, text_folder: Path) -> None:
    hub.repository("user/model").commit({"README.md": b"# main"})
    target = Target(repo_id="user/model", branch="next")
    remote = look_up(target, "user/model")
    assert remote.card == "# main"
    assert list(hub.repositories["user/model"].branches) == ["main"]
    (text_folder / "README.md").unlink()
    upload(text_folder, target, remote, "a push")
    assert branch(hub, "user/model", "next")["README.md"] == b"# main"


def test_a_push_with_a_space_publishes_the_page_of_the_demo(
    hub: LoopbackHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # create and update
        assert main(["push", str(run), "user/birds", "--space", "demo", "--zero_gpu"]) == 0
    files = branch(hub, "user/demo")
    assert files["demo.py"] == (REPOSITORY / "ddpm_hf/demo.py").read_bytes()
    assert "MODEL = 'user/birds'" in files["app.py"].decode()
    compile(files["app.py"], "app.py", "exec")
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", ["user/birds"])
    assert {"torch>=2.10", "spaces"} <= set(files["requirements.txt"].decode().split())
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.endpoint}/spaces/user/demo"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(["--zero_gpu"], "add --space user/name"), (["--space", "a/b", "--pull_request"], "remove one of them")],
)
def test_a_space_needs_a_published_model(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert main(["push", str(run), "user/birds", *options]) == 2
    assert sentence in capsys.readouterr().err
