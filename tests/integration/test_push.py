"""A finished run or a pipeline goes to a Hub on loopback, whole or not at all, and is loaded from there."""

import json
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm_hf.cli.main import main
from ddpm_hf.config import HubConfig
from ddpm_hf.hub import publish as hub_publish
from ddpm_hf.hub import push as hub_push
from ddpm_hf.hub.background import BackgroundPush
from ddpm_hf.hub.export import assemble
from ddpm_hf.hub.publish import publish
from ddpm_hf.hub.push import HubFailed, HubRefused, Pushed, Target, check_access, look_up, push
from tests.conftest import REPOSITORY
from tests.documents import blocks
from tests.integration.conftest import SECRET
from tests.load_and_sample import Task, carry_out_elsewhere, sample
from tests.loopback_hub import LoopbackHub, files_of
from tests.saved_folders import make_pipeline

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, as training leaves one, with what belongs to nobody else beside it."""
    folder = tmp_path_factory.mktemp("runs") / "birds"
    make_pipeline("plain").save_pretrained(folder / "pipeline")
    for name in ("samples.png", "denoising.png", "denoising.gif", "loss.png"):
        Image.new("L", (8, 8)).save(folder / name)
    (folder / "pipeline" / "training_config.yaml").write_text(
        f"data:\n  source: {folder}/secret/birds\n  cache_dir: null\ntraining:\n  output_dir: {folder}\n"
    )
    (folder / "pipeline" / "notes.txt").write_text("mine")
    (folder / "pipeline" / "optimizer.safetensors").write_text("mine")
    (folder / "pipeline" / "pipeline.py").write_text("raise SystemExit('code of somebody else')\n")
    return folder


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A folder for tests of the transfer alone."""
    folder = tmp_path / "assembled"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("# A model\n")
    (folder / WEIGHTS).write_bytes(b"w" * 5000)
    return folder


def branch(hub: LoopbackHub, name: str, revision: str = "main") -> dict[str, bytes]:
    return hub.repositories[name].files(revision)


def send(folder: Path, target: Target) -> Pushed:
    return push(folder, target, look_up(target, check_access(target)), "a push")


@pytest.mark.timeout(600)
def test_a_run_is_published_and_loads_in_all_three_ways_also_offline(
    hub: LoopbackHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ways 1 and 2 by a process that cannot import ddpm_hf; offline from the cache, way 2 by its snapshot."""
    assert main(["push", str(run), "birds", "--license", "mit", "--fp16"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.endpoint}/user/birds"
    files = branch(hub, "user/birds")
    assert set(files) - {name for name in files if name.endswith(".py")} == {
        ".gitattributes", "README.md", "model_index.json", "scheduler/reverse_variance.json",
        "scheduler/scheduler_config.json", "training_config.yaml", "unet/config.json", "verification.json", WEIGHTS,
        "unet/diffusion_pytorch_model.fp16.safetensors", "samples/samples.png", "samples/denoising.png",
        "samples/denoising.gif", "samples/loss.png", "samples/schedule.png",
    }  # fmt: skip
    assert b"code of somebody else" not in files["pipeline.py"]
    assert str(run.parent).encode() not in hub.seen
    settings = files["training_config.yaml"].decode()
    assert "source: birds\n" in settings
    assert "output_dir: birds\n" in settings

    online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    first, third = [Task("1", 1, "user/birds"), Task("2", 2, "user/birds")], Task("3", 3, "user/birds")
    outcomes = carry_out_elsewhere(first, tmp_path, tmp_path / "home", **online)
    outcomes |= carry_out_elsewhere([third], tmp_path, tmp_path / "home", with_ddpm_hf=True, **online)
    [snapshot] = (tmp_path / "home").glob("hub/models--user--birds/snapshots/*")
    num_requests = len(hub.requests)
    tasks = [first[0], Task("2", 2, str(snapshot)), third]
    offline = carry_out_elsewhere(tasks, tmp_path, tmp_path / "home", with_ddpm_hf=True)
    assert len(hub.requests) == num_requests
    expected = sample(make_pipeline("plain"))
    for way, found in [*outcomes.items(), *offline.items()]:
        assert found.images is not None, (way, found.refusal)
        # Stock differs by its float32 tables, 10 steps of 1e-5 with the network between.
        torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-3 if way == "1" else 0)


def test_the_code_of_the_document_publishes(
    hub: LoopbackHub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "outputs" / "digits")
    monkeypatch.chdir(tmp_path)
    [code] = [code for code in blocks((REPOSITORY / "docs" / "hub.md").read_text(), "python") if "publish(" in code]
    exec(compile(code, "hub.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out == f"{hub.endpoint}/user/digits\n"
    assert b"license: mit" in branch(hub, "user/digits")["README.md"]


def test_a_dry_run_says_what_would_go_and_asks_nobody(
    hub: LoopbackHub, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(run), "user/birds", "--dry_run", "--private", "--branch", "next"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith(WEIGHTS) and " kB " in line for line in lines)
    assert lines[-2].endswith("files would go to user/birds, branch next (private, if it is made).")
    assert lines[-1] == "The Hub was not asked whether you may push there, nor what its card keeps."
    assert not any("licence" in line for line in lines)
    assert hub.requests == []


def test_a_second_push_sends_only_what_has_changed(
    hub: LoopbackHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same model made anew has the same bytes, all but nothing; another card section is one file."""
    command = ["push", str(run), "birds", "--license", "mit"]
    assert main(command) == 0
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("was up to date; nothing was sent")
    assert len(hub.uploaded) == 1
    changed = Path(shutil.copytree(run, tmp_path / "run"))
    Image.new("L", (9, 9)).save(changed / "loss.png")
    assert main(["push", str(changed), *command[2:]]) == 0
    assert set(hub.uploaded[-1].files) == {"samples/loss.png"}


def test_a_card_edited_on_the_hub_is_kept(hub: LoopbackHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "birds"]) == 0
    files = branch(hub, "user/birds")
    card = files["README.md"].decode()
    edited = card.replace("## What it is not", "## What I know of it").replace("license: unknown", "license: mit")
    assert edited != card
    hub.repositories["user/birds"].commit(files | {"README.md": edited.encode() + b"\nAsk me.\n"})
    capsys.readouterr()
    assert main(["push", str(run), "birds"]) == 0
    assert "README.md: limits was edited on the Hub, and stays as it is there." in capsys.readouterr().out
    now = branch(hub, "user/birds")["README.md"].decode()
    assert "## What I know of it" in now and "license: mit" in now and now.endswith("\nAsk me.\n")


def test_private_branch_and_pull_request_are_what_they_say(hub: LoopbackHub, text_folder: Path) -> None:
    send(text_folder, Target(repo_id="hidden", private=True))
    assert hub.repositories["user/hidden"].private
    pushed = send(text_folder, Target(repo_id="user/open", branch="experiments/1"))
    assert pushed.url == f"{hub.endpoint}/user/open/tree/experiments/1"
    assert not hub.repositories["user/open"].private
    assert "README.md" in branch(hub, "user/open", "experiments/1")
    assert "README.md" not in branch(hub, "user/open")
    (text_folder / "README.md").write_text("# A better model\n")
    pushed = send(text_folder, Target(repo_id="user/open", as_pull_request=True))
    assert pushed.url == f"{hub.endpoint}/user/open/discussions/1"
    assert branch(hub, "user/open", "refs/pr/1")["README.md"] == b"# A better model\n"
    assert "README.md" not in branch(hub, "user/open")


def test_the_branch_main_comes_with_a_new_repository(hub: LoopbackHub, text_folder: Path) -> None:
    pushed = send(text_folder, Target(repo_id="user/new", branch="main"))
    assert pushed == Pushed(f"{hub.endpoint}/user/new/tree/main", is_new=True)
    assert branch(hub, "user/new").items() >= files_of(text_folder).items()
    assert not send(text_folder, Target(repo_id="user/new", branch="main")).is_new


def test_what_an_earlier_push_left_goes_and_what_others_put_there_stays(hub: LoopbackHub, text_folder: Path) -> None:
    theirs = {"LICENSE": b"mit", "demo.py": b"x", "samples/mine.png": b"x", "unet/README": b"x"}
    ours = {
        "unet/diffusion_pytorch_model.fp16.safetensors": b"old",
        "samples/loss.png": b"old",
        "evaluation.json": b"{}",
    }
    hub.repository("user/model").commit(theirs | ours)
    send(text_folder, Target(repo_id="user/model"))
    assert branch(hub, "user/model") == files_of(text_folder) | theirs


REFUSALS = [
    ("/auth-check", 401, HubRefused, "the Hub does not accept your login"),
    ("/preupload/", 403, HubRefused, "you may not write to user/model"),
    ("/commit/", 403, HubRefused, "you may not write to user/model"),
    ("/commit/", 409, HubRefused, "was changed by somebody else in the same moment"),
    ("/commit/", 500, HubFailed, "the Hub could not do it"),
    ("objects/batch", 500, HubFailed, "the Hub could not do it"),
    ("PUT ", 500, HubFailed, "the Hub could not do it"),
    ("whoami", "cut", HubFailed, "the Hub could not be reached"),
    ("PUT ", "cut", HubFailed, "the Hub could not be reached"),
    ("/commit/", "cut", HubFailed, "the Hub could not be reached"),
]


@pytest.mark.parametrize(("request_", "status", "kind", "sentence"), REFUSALS)
def test_what_the_hub_answers_becomes_a_sentence_and_nothing_is_half_published(
    hub: LoopbackHub, text_folder: Path, request_: str, status: int, kind: type[Exception], sentence: str
) -> None:
    """Whatever the client tries again by itself; the next push succeeds."""
    before = {"README.md": b"before"}
    hub.repository("user/model").commit(before)
    hub.fail(request_, status, times=20, after_bytes=100 if (status, request_) == ("cut", "PUT ") else None)  # type: ignore[arg-type]
    with pytest.raises(kind) as caught:
        send(text_folder, Target(repo_id="user/model"))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert branch(hub, "user/model") == before
    hub.mend()
    send(text_folder, Target(repo_id="user/model"))
    assert branch(hub, "user/model") == files_of(text_folder)


def test_a_push_whose_answer_is_lost_is_not_said_to_be_undone(hub: LoopbackHub, text_folder: Path) -> None:
    hub.fail("/commit/", "lost", times=20)
    with pytest.raises((HubFailed, HubRefused)) as caught:
        send(text_folder, Target(repo_id="user/model"))
    assert "nothing was published" not in str(caught.value)
    assert branch(hub, "user/model").items() >= files_of(text_folder).items()


def test_a_change_between_looking_and_pushing_is_not_overwritten(hub: LoopbackHub, text_folder: Path) -> None:
    target = Target(repo_id="user/model")
    send(text_folder, target)
    remote = look_up(target, "user/model")
    theirs = branch(hub, "user/model") | {"README.md": b"# Edited meanwhile\n"}
    hub.repositories["user/model"].commit(theirs)
    (text_folder / "README.md").write_text("# Mine\n")
    with pytest.raises(HubRefused, match="was changed by somebody else in the same moment"):
        push(text_folder, target, remote, "a push")
    assert branch(hub, "user/model") == theirs


@pytest.mark.parametrize("name", [None, "next"])
def test_what_somebody_made_since_looking_is_not_touched(hub: LoopbackHub, text_folder: Path, name: str | None) -> None:
    """The repository, or the branch."""
    target = Target(repo_id="user/model", branch=name)
    if name:
        hub.repository("user/model").commit({"README.md": b"# main"})
    remote = look_up(target, "user/model")
    theirs = {"README.md": b"# Made meanwhile\n"}
    hub.repository("user/model").commit(theirs, name or "main")
    with pytest.raises(HubRefused, match="was changed by somebody else in the same moment"):
        push(text_folder, target, remote, "a push")
    assert branch(hub, "user/model", name or "main") == theirs


def test_a_new_branch_begins_with_the_card_of_main(hub: LoopbackHub, text_folder: Path) -> None:
    hub.repository("user/model").commit({"README.md": b"# main"})
    target = Target(repo_id="user/model", branch="next")
    remote = look_up(target, "user/model")
    assert remote.card == "# main"
    assert list(hub.repositories["user/model"].branches) == ["main"]
    (text_folder / "README.md").unlink()
    push(text_folder, target, remote, "a push")
    assert branch(hub, "user/model", "next")["README.md"] == b"# main"


def test_who_may_not_write_is_told_before_any_work(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repository("user/model")
    monkeypatch.setenv("HF_TOKEN", hub.reader_token)
    with pytest.raises(HubRefused, match="you may not write to user/model"):
        check_access(Target(repo_id="user/model"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(HubRefused, match="somebody/model does not exist, and user cannot make it there; choose a name"):
        check_access(Target(repo_id="somebody/model"))
    with pytest.raises(HubRefused, match=r"cannot make it there; choose a name under org or user\.$"):
        check_access(Target(repo_id="readers/new"))
    with pytest.raises(HubRefused, match="user/new does not exist, so there is nothing to propose a change to"):
        check_access(Target(repo_id="user/new", as_pull_request=True))
    assert check_access(Target(repo_id="org/new")) == "org/new"
    assert check_access(Target(repo_id="new")) == "user/new"
    assert "POST /api/repos/create" not in hub.requests
    hub.fine_grained = ["repo.content.read", "repo.write"]
    assert check_access(Target(repo_id="new")) == "user/new"
    hub.fine_grained = ["repo.content.read"]
    with pytest.raises(HubRefused, match="user/new does not exist, and your token cannot make it; use a token with"):
        check_access(Target(repo_id="new"))
    hub.fine_grained = None
    monkeypatch.setenv("HF_TOKEN", hub.reader_token)
    with pytest.raises(HubRefused, match="user/new does not exist, and your token cannot make it; use a token with"):
        check_access(Target(repo_id="new"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(HubRefused, match="nobody is logged in to the Hub; run hf auth login, or set HF_TOKEN"):
        check_access(Target(repo_id="user/model"))


@pytest.mark.parametrize("sign", ["é", "\t", "\x01"])
def test_a_token_that_is_none_is_told_without_a_character_of_it(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    token = f"hf_{sign}secret"
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubRefused) as caught:
        check_access(Target(repo_id="user/model"))
    assert str(caught.value) == (
        "the token holds a character that no token has; run hf auth login, or set HF_TOKEN anew."
    )
    assert hub.requests == []


def test_nobody_believes_a_public_repository_to_be_private(hub: LoopbackHub) -> None:
    """Neither a push nor a training, which asks before its first step."""
    hub.repository("user/open").commit({})
    hub.repository("user/hidden").commit({})
    hub.repositories["user/hidden"].private = True
    assert check_access(Target(repo_id="hidden", private=True)) == "user/hidden"
    assert check_access(Target(repo_id="open")) == "user/open"
    with pytest.raises(HubRefused, match="user/open exists and is public; leave private out, or make it private in"):
        check_access(Target(repo_id="open", private=True))
    with pytest.raises(HubRefused, match="user/open exists and is public"):
        BackgroundPush(HubConfig(push_to_hub=True, repo_id="open", private=True), Path("unused")).check()


def test_offline_is_said_to_be_offline(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _http.close_session()
    with pytest.raises(HubFailed, match="HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"):
        check_access(Target(repo_id="user/model"))


@pytest.mark.parametrize("name", ["", "user/", "a/b/c", "user/mo del", "-x", "user/model.git", "../x", "x" * 97])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(HubRefused, match=r'is no name of a repository; give "user/name"'):
        Target(repo_id=name)


@pytest.mark.parametrize("branch", ["a..b", "-x", "a b", "a/", "", "a.lock", "a.lock/b", "a.", "a/.b", "HEAD"])
def test_a_malformed_branch_is_refused(branch: str) -> None:
    with pytest.raises(HubRefused, match="is no name of a branch"):
        Target(repo_id="user/model", branch=branch)


def test_the_token_is_in_nothing_but_its_header(
    hub: LoopbackHub, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not in what is sent, printed or written, also where the Hub repeats it in an error."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    assert main(["push", str(copied), "birds"]) == 0
    hub.fail("/commit/", 500, times=20)
    Image.new("L", (9, 9)).save(copied / "loss.png")
    assert main(["push", str(copied), "birds"]) == 1
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert SECRET.encode() not in hub.seen
    assert not any(SECRET.encode() in content for content in files_of(tmp_path).values())


def test_weights_that_are_not_finite_are_never_published(
    hub: LoopbackHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    path = copied / "pipeline" / WEIGHTS
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = 1e5  # too large for half precision
    save_file(tensors, path, {"format": "pt"})
    assert main(["push", str(copied), "birds", "--fp16"]) == 2
    assert "has weights that are not finite as float16 (conv_in.bias); leave fp16 out." in capsys.readouterr().err
    tensors["conv_in.bias"][0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    assert main(["push", str(copied), "birds"]) == 2
    assert "has weights that are not finite as float32 (conv_in.bias)" in capsys.readouterr().err
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: shutil.rmtree(run / "pipeline"), "holds no pipeline (model_index.json); give the folder that"),
        (lambda run: (run / "pipeline").rename(run / "checkpoints"), "holds a run that is not finished"),
        (lambda run: shutil.rmtree(run), "is no folder of this machine"),
        (lambda run: (run / "pipeline" / "evaluation.json").write_text("{"), "evaluation.json cannot be read"),
        (lambda run: (run / "pipeline" / "evaluation.json").write_text("[]"), "evaluation.json holds no record but []"),
        (lambda run: (run / "pipeline" / "training_config.yaml").write_text("a: ["), "training_config.yaml cannot be"),
        (lambda run: (run / "loss.png").write_text("<html>"), "loss.png is no picture that can be published"),
        (lambda run: (run / "pipeline" / WEIGHTS).write_bytes(b"x" * 99), "holds no pipeline that can be loaded"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_published_gets_a_sentence_and_exit_code_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: object, sentence: str
) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    damage(copied)  # type: ignore[operator]
    assert main(["push", str(copied), "user/birds", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert str(copied) in error
    assert error.count("\n") == 1


def test_a_broken_record_makes_no_repository(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    (copied / "pipeline" / "evaluation.json").write_text('{"schema_version": 1, "metrics": 3}')
    with pytest.raises(ValueError, match=f"{copied}/pipeline/evaluation.json is broken"):
        publish(copied / "pipeline", Target(repo_id="birds"))
    assert hub.repositories == {}


def test_a_pipeline_that_is_not_what_was_saved_is_not_published(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    assemble(copied / "pipeline", tmp_path / "assembled")
    tensors = load_file(tmp_path / "assembled" / WEIGHTS)
    tensors["conv_in.weight"] *= 1.5
    save_file(tensors, tmp_path / "assembled" / WEIGHTS, {"format": "pt"})
    assert main(["push", str(tmp_path / "assembled"), "user/birds", "--dry_run"]) == 2
    assert "is not the pipeline that was saved" in capsys.readouterr().err


def test_pictures_are_drawn_where_there_are_none_and_links_are_not_followed(tmp_path: Path) -> None:
    make_pipeline("labelled").save_pretrained(tmp_path / "pipeline")
    private = tmp_path / "private.png"
    Image.new("L", (8, 8)).save(private)
    (tmp_path / "loss.png").symlink_to(private)
    assemble(tmp_path / "pipeline", tmp_path / "assembled", run=tmp_path)
    assert sorted(path.name for path in (tmp_path / "assembled" / "samples").iterdir()) == [
        "denoising.gif", "denoising.png", "samples.png", "schedule.png",
    ]  # fmt: skip


def test_pictures_of_real_images_are_published_only_if_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["push", str(Path(shutil.copytree(run, tmp_path / "run"))), "user/birds", "--dry_run"]
    assert main([*command, "--with_real_images"]) == 2
    assert "has no evaluation.png, which alone shows real images" in capsys.readouterr().err
    Image.new("L", (8, 8)).save(tmp_path / "run" / "pipeline" / "evaluation.png")
    assert main(command) == 0
    assert "evaluation.png" not in capsys.readouterr().out
    assert main([*command, "--with_real_images"]) == 0
    assert "samples/evaluation.png" in capsys.readouterr().out


def test_a_push_that_is_stopped_leaves_nothing_behind(
    hub: LoopbackHub,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)

    def assemble_and_stop(*arguments: Any, **settings: Any) -> None:
        assemble(*arguments, **settings)
        assert list(tmp_path.glob("ddpm-hf-push-*/*"))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(hub_publish, "assemble", assemble_and_stop)
    assert main(["push", str(run), "birds"]) == 143
    assert "error: ended by SIGTERM; the same command begins this part again." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
    assert hub.repositories == {}


def test_there_is_no_option_for_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["push", "x", "y", "--token", SECRET])
    assert SECRET not in capsys.readouterr().err
    assert "token" not in {name for name in vars(hub_push.Target(repo_id="a"))}


def test_numbers_that_json_does_not_have_are_none(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    (copied / "pipeline" / "training_summary.json").write_text('{"step": 3, "loss": NaN, "score": {"score": Infinity}}')
    assemble(copied / "pipeline", tmp_path / "assembled")
    content = (tmp_path / "assembled" / "training_summary.json").read_text()
    assert json.loads(content) == {"step": 3, "loss": None, "score": {"score": None}}
