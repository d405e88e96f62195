"""Continuing an untrusted run folder, checkpoint or configuration runs no code.

The manifests fit the files, since an attacker can compute checksums too.
"""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from ddpm_hf.cli import main
from tests.conftest import run_arguments
from tests.runs import sign
from tests.security.conftest import Watch
from tests.security.hostile import module_that_runs, pickle_that_runs, torch_file_that_runs

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

WEIGHTS = "diffusion_pytorch_model.safetensors"
AVERAGE = "ema_sigma_0.050.safetensors"
Attack = Callable[[Path, Path], object]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with EMA snapshots. Read only."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    run = tmp_path_factory.mktemp("honest") / "run"
    assert main.train(run_arguments(run, training__num_steps=4, training__posthoc_ema=True)) == 0
    return run


def pickled(name: str) -> Attack:
    return lambda folder, canary: (folder / name).write_bytes(pickle_that_runs(canary))


def zipped(name: str) -> Attack:
    return lambda folder, canary: torch_file_that_runs(canary, folder / name)


def tagged(folder: Path, canary: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text + f"x: !!python/object/apply:os.system ['touch {canary}']\n")


def edited(**changes: object) -> Attack:
    def attack(folder: Path, canary: Path) -> None:
        path = folder / "trainer_state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return attack


SIGNED: dict[str, Attack] = {
    "a pickle called safetensors": pickled("optimizer.safetensors"),
    "a zip of PyTorch called safetensors": zipped("optimizer.safetensors"),
    "pickled weights": pickled(f"unet/{WEIGHTS}"),
    "pickled averages": pickled(f"ema/{WEIGHTS}"),
    "pickled losses": pickled("objective.safetensors"),
    "a configuration with tags": tagged,
    "counters with other names": edited(__class__="os.system"),
}


@pytest.fixture
def run(honest: Path, watch: Watch) -> Path:
    watch.is_on = False
    shutil.copytree(honest, watch.folder / "run")
    watch.is_on = True
    return watch.folder / "run"


def train_on(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Train two more steps and return the exit code and stderr."""
    arguments = run_arguments(run, training__num_steps=6, training__posthoc_ema=True)
    capsys.readouterr()
    exit_code = main.train([*arguments, "--training.resume", "auto"])
    return exit_code, capsys.readouterr().err


@pytest.mark.parametrize("name", SIGNED)
def test_a_checkpoint_with_valid_checksums_runs_no_code(
    run: Path, watch: Watch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = run / "checkpoints" / "step_00000004"
    watch.is_on = False
    SIGNED[name](folder, watch.canary)
    sign(folder)
    watch.is_on = True
    exit_code, error = train_on(run, capsys)
    assert exit_code == 2, error
    assert "Traceback" not in error
    assert str(folder) in error.splitlines()[-1]


def test_additional_pickles_in_a_checkpoint_are_ignored(
    run: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the names that Accelerate would load."""
    folder = run / "checkpoints" / "step_00000004"
    watch.is_on = False
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "unet/pytorch_model.bin"):
        pickled(name)(folder, watch.canary)
    sign(folder)
    watch.is_on = True
    assert train_on(run, capsys)[0] == 0


def point_outside(folder: Path, watch: Watch) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../../outside"] = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def link(folder: Path, watch: Watch) -> None:
    folder.rename(watch.folder / "elsewhere")
    folder.symlink_to(watch.folder / "elsewhere")


def nest(folder: Path, watch: Watch) -> None:
    (folder / "manifest.json").write_text('{"files": ' + "[" * 100_000)


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (point_outside, "../../../outside is missing"),
        (link, "step_00000004 is a link"),
        (nest, "manifest.json is missing or unreadable"),
    ],
)
def test_a_checkpoint_with_paths_outside_its_folder_is_skipped(
    run: Path, watch: Watch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
    attack: Callable[[Path, Watch], object], reason: str,
) -> None:  # fmt: skip
    watch.is_on = False
    (watch.folder / "outside").write_text("x")
    attack(run / "checkpoints" / "step_00000004", watch)
    elsewhere = {path: path.read_bytes() for path in (watch.folder / "elsewhere").rglob("*") if path.is_file()}
    watch.is_on = True
    assert train_on(run, capsys)[0] == 0
    assert f"step_00000004: {reason}" in caplog.text
    assert (watch.folder / "outside").read_text() == "x"
    assert elsewhere == {path: path.read_bytes() for path in elsewhere}
    assert (attack is link) == bool(elsewhere)


# ------------------------------------------------------------------------------------------------------- ddpm-hf ema


def hostile_index(folder: Path, canary: Path) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scheduler": ["os", "system"]}))


@pytest.mark.parametrize(
    "attack", [pickled(AVERAGE), zipped(AVERAGE), hostile_index], ids=["pickle", "PyTorch zip", "index"]
)
def test_ema_snapshots_run_no_code(run: Path, watch: Watch, capsys: pytest.CaptureFixture[str], attack: Attack) -> None:
    folders = list((run / "ema_snapshots").iterdir())
    assert all((folder / AVERAGE).is_file() for folder in folders)
    watch.is_on = False
    for folder in folders:
        attack(folder, watch.canary)
        sign(folder)
    watch.is_on = True
    exit_code = main.ema([str(run), "--length", "0.05"])
    error = capsys.readouterr().err
    if exit_code == 0:  # the EMA of the other length is enough
        assert attack is not hostile_index
    else:
        assert (exit_code, "Traceback" in error) == (2, False)
        assert error.splitlines()[-1].startswith("error: ")


def test_a_linked_configuration_is_not_copied_into_the_new_pipeline(
    run: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = watch.folder / "netrc"
    secret.write_text("password")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(secret)
    assert main.ema([str(run), "--length", "0.1", "--output", str(watch.folder / "new")]) == 2
    assert "is a link" in capsys.readouterr().err
    assert not (watch.folder / "new").exists()


# ------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "line",
    [
        "training: !!python/object/apply:os.system ['touch CANARY']",
        "data: !!python/object/new:subprocess.Popen [['touch', 'CANARY']]",
        "data: {source: !!python/name:os.system }",
        "!!python/module:antigravity",
        "data: {class_path: subprocess.Popen, init_args: {args: [touch, CANARY]}}",
        "model: {overrides: {class_path: os.system, init_args: {command: touch CANARY}}}",
        "data: {class_path: hostile_module.GaussianDiffusionPipeline}",
        "training: {optimizer_kwargs: {a: {class_path: hostile_module.GaussianDiffusionPipeline}}}",
    ],
)
def test_a_yaml_file_runs_no_code(
    watch: Watch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """Not even a module on the search path of Python, such as one in the working directory."""
    (watch.folder / "hostile_module.py").write_text(module_that_runs(watch.canary))
    monkeypatch.syspath_prepend(str(watch.folder))
    path = watch.folder / "evil.yaml"
    path.write_text(line.replace("CANARY", str(watch.canary)) + "\n")
    output_dir = watch.folder / "out"
    assert main.train(["--config", str(path), *run_arguments(output_dir)[4:], "--dry_run"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not output_dir.exists()


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen"])
def test_an_imported_optimizer_must_be_an_optimizer(
    watch: Watch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The import itself runs code that the user asked for; its functions are not called."""
    arguments = run_arguments(watch.folder / "run", training__optimizer=name)
    assert main.train([*arguments, "--dry_run"]) == 2
    assert f"error: training.optimizer {name} " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../ddpm_hf-escaped", "/tmp/ddpm_hf-escaped", "", 7])
def test_a_tracker_id_cannot_be_a_path(
    run: Path, watch: Watch, capsys: pytest.CaptureFixture[str], name: object
) -> None:
    (run / "trackers.json").write_text(json.dumps({"id": name}))
    arguments = run_arguments(
        run, training__num_steps=6, training__posthoc_ema=True, tracking__trackers='["tensorboard"]'
    )
    assert main.train(arguments) == 2
    assert "trackers.json" in capsys.readouterr().err


def test_the_hostile_pickles_run_code_when_unpickled(watch: Watch) -> None:
    watch.is_on = False
    pickle.loads(pickle_that_runs(watch.canary)).close()  # noqa: S301
    assert watch.canary.exists()
    watch.canary.unlink()
