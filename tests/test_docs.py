"""The documents: their commands and Python blocks run, their links resolve, the generated reference is up to date.

Commands and code run in a temporary folder, with tiny finished runs where the documents expect one. Commands that need
a download, a login or another program are parsed instead.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DModel
from PIL import Image
from torch.distributed.run import get_args_parser

from ddpm_hf import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.cli import main as cli
from ddpm_hf.config import RunConfig, parse_command_line
from tests.conftest import REPOSITORY
from tests.documents import DOCUMENTS, FENCED, blocks, text_of
from tests.saved_folders import make_pipeline

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))
CHINESE = REPOSITORY / "README_zh.md"  # has the commands and the code of README.md
OTHER_PROGRAMS = {"cd", "diff", "git", "hf", "pip", "pytest", "uv", "uvx"}
# Appended to training commands that do not set them.
SMALL = {
    "--model.overrides": '{"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}',
    "--model.preset": "digits_8",
    "--data.resolution": "8",
    "--diffusion.num_train_timesteps": "100",
    "--training.train_batch_size": "8",
    "--training.num_steps": "2",
    "--training.mixed_precision": "fp32",
    "--preview.every_steps": "0",
    "--evaluation.num_samples": "0",
    "--evaluation.recognition": "false",
}


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes, the digits, photos, and tiny models where the documents expect a run."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("benchmarks", "configs", "data", "docs", "tests"):
        (folder / name).symlink_to(REPOSITORY / name)
    for number in range(16):
        path = folder / "photos" / ("cats", "dogs")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(number).convert("RGB").resize((64, 64)).save(path)
    shutil.copy(path, folder / "photo.jpg")
    with_report = SMALL | {"--evaluation.num_samples": "10", "--evaluation.num_inference_steps": "2"}
    small = [part for item in with_report.items() for part in item]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for options in ([], ["--training.output_dir", "outputs/run", "--training.posthoc_ema", "true"]):
            reset_accelerate()
            assert cli.main(["train", "--config", "configs/digits_8.yaml", *options, *small]) == 0
    for name in ("run1", "run2"):
        (folder / "outputs" / name).mkdir()
        for file in ("config.yaml", "metrics.jsonl"):
            shutil.copy(folder / "outputs/digits" / file, folder / "outputs" / name / file)
    save_model(folder / "user/model", ["cat", "dog"])
    shutil.copytree(folder / "user/model", folder / "user/digits")
    make_pipeline("latent").save_pretrained(folder / "user/latents")
    return folder


@pytest.fixture
def reader(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that folder as the working directory."""
    shutil.copytree(finished, tmp_path / "reader", symlinks=True)
    monkeypatch.chdir(tmp_path / "reader")
    reset_accelerate()
    yield tmp_path / "reader"
    reset_accelerate()


def save_model(folder: Path, names: list[str]) -> None:
    """Save a class-conditional model with these class names and a null label."""
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
            num_class_embeds=len(names) + 1,
        )
    class_names = {str(label): name for label, name in enumerate(names)}
    pipeline = GaussianDiffusionPipeline(
        unet, GaussianDiffusionScheduler(), class_names=class_names, has_null_label=True
    )
    pipeline.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------- commands


def commands_of(path: Path) -> list[str]:
    """Return every command of the sh blocks of a document."""
    lines = [line for block in blocks(text_of(path), "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if shlex.split(line, comments=True)]


def of_small_runs(text: str) -> str:
    """Replace the checkpoints that a text names by the last one of the small runs."""
    return re.sub(r"step_\d{8}", "step_00000002", text)


def run_command(line: str) -> None:
    """Run a command of ddpm_hf at a small size, or parse it where it cannot run here.

    Args:
        line: A command as a document shows it. Flags alone are settings of a training run.
    """
    words = shlex.split(of_small_runs(line), comments=True)
    missing = [word for word in words if re.match(r"(benchmarks|configs|data|docs|tests)/\w", word)]
    assert all(Path(word.partition("::")[0]).exists() for word in missing), line
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0].startswith(("empty/", ".venv")):  # environments of a release
        return
    if words[0] in ("hf", "uv") and "run" in words:  # a command of ours in an environment of uv
        ours = [index for index, word in enumerate(words) if word in ("accelerate", "ddpm-hf", "train_ddpm.py")]
        words = words[ours[0] :]
        words = ["python", *words] if words[0] == "train_ddpm.py" else words
    if words[0].startswith("--"):
        words = ["ddpm-hf", "train", "--config", "configs/cifar10_32.yaml", *words]
    if words[0] in ("accelerate", "torchrun"):
        parser, arguments = (
            (launch_command_parser(), words[2:]) if words[0] == "accelerate" else (get_args_parser(), words[1:])
        )
        options = parser.parse_args(arguments)
        module = ["-m"] if options.module else []
        words = ["python", *module, options.training_script, *options.training_script_args]
    if words[:2] == ["python", "train_ddpm.py"]:
        words = ["ddpm-hf", "train", *words[2:]]
    elif words[:3] == ["python", "-m", "ddpm_hf"]:
        words = ["ddpm-hf", *words[3:]]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):.*## ", text_of(REPOSITORY / "Makefile"), re.MULTILINE)
        assert set(words[1:2]) <= set(targets), line
    elif words[0] == "python" and words[1] == "-c":
        exec(compile(words[2], "-c", "exec"), {})  # noqa: S102
    elif words[0] == "ddpm-hf":
        run_ddpm_hf(words[1], words[2:])
    else:
        assert words[0] in {*OTHER_PROGRAMS, "python"}, line


def run_ddpm_hf(name: str, arguments: list[str]) -> None:
    assert name in cli.COMMANDS, name
    options = dict(itertools.pairwise(arguments))
    if int(options.get("--num_inference_steps", 0)) > 10:
        arguments = [*arguments, "--num_inference_steps", "10"]
    if name == "train":
        config, _ = parse_command_line(arguments)
        if config.data.vae is not None or not Path(config.data.source).exists():
            return  # from the Hub
        given = {"--training.num_steps": "3", "--evaluation.score_num_samples": "4"}
        small = SMALL | {name: value for name, value in given.items() if name in options}
        arguments = [*arguments, *(part for item in small.items() for part in item)]
        if config.hub.push_to_hub or config.training.resume_from_hub or config.tracking.trackers:
            return  # needs a login
    elif name == "evaluate":
        if options["--metrics"] != "bits_per_dim" or not Path(options["--data"]).exists():
            return check_flags(name, arguments)  # needs the Inception network, or a Hub dataset
        arguments = [*arguments, "--num_terms", "2", "--num_images", "4"]
        if "--estimate_variance" in options:
            arguments = [*arguments, "--estimate_variance", "1"]
    elif name == "convert" and not Path(arguments[0]).exists():
        return check_flags(name, arguments)  # a checkpoint of another system
    elif "--revision" in options:
        return check_flags(name, arguments)  # a Hub repository
    elif name == "timesteps":
        arguments = [*arguments, "--num_images", "2"]
    elif name == "demo":
        return check_flags(name, arguments)  # serves until it is stopped
    elif name == "distill":
        arguments = [*arguments, "--steps", "4", "--training.num_steps", "2", "--evaluation.num_samples", "0"]
    elif name == "push":
        arguments = [word for word in arguments if word != "--dry_run"] + ["--dry_run"]
    reset_accelerate()
    assert cli.main([name, *arguments]) == 0, shlex.join([name, *arguments])


def check_flags(name: str, arguments: list[str]) -> None:
    unknown = {word for word in arguments if word.startswith("--")} - set(re.findall(r"--[\w.]+", help_of(name)))
    assert unknown == set(), f"ddpm-hf {name} has no {', '.join(unknown)}"


def help_of(*words: str) -> str:
    """Return what `ddpm-hf WORDS --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as left:
        cli.main([*words, "--help"])
    assert left.value.code == 0
    return printed.getvalue()


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if commands_of(path) and path != CHINESE], ids=lambda path: path.name
)
def test_the_commands_of_a_document_run(path: Path) -> None:
    for line in commands_of(path):
        run_command(line)


@pytest.mark.usefixtures("reader")
def test_the_errors_that_the_training_document_shows_are_errors() -> None:
    shown = re.findall(
        r"^\$ python train_ddpm\.py (.*)\nerror: ", text_of(REPOSITORY / "docs/training.md"), re.MULTILINE
    )
    assert shown
    for arguments in shown:
        assert cli.main(["train", *shlex.split(arguments)]) == 2


@pytest.mark.usefixtures("reader")
def test_the_commands_of_the_recipes_are_accepted() -> None:
    for recipe in RECIPES:
        (line,) = re.findall(r"^# Command: +(.*)$", text_of(recipe), re.MULTILINE)
        run_command(line)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_help_has_examples_with_known_flags(name: str) -> None:
    examples = re.findall(rf"\b(?:ddpm-hf {name}|train_ddpm\.py) (.*)", help_of(name).partition("xample")[2])
    assert examples
    for example in examples:
        check_flags(name, re.split(r"  |;", example)[0].split())


# ----------------------------------------------------------------------------------------------------------- code


def shortened(code: str) -> str:
    """Return code that trains a hundredth of its steps, and a narrow network of its own."""
    steps = re.compile(r'(?<="training\.num_steps": )\d+')
    narrow = code.replace("block_out_channels=(32, 64)", "block_out_channels=(8, 16)")
    return steps.sub(lambda found: str(max(1, int(found[0]) // 100)), narrow)


# The code of docs/hub.md pushes: tests/integration/test_push.py runs it.
ELSEWHERE = ("hub.md", "python.md", CHINESE.name)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if blocks(text_of(path), "python") and path.name not in ELSEWHERE],
    ids=lambda path: path.name,
)
def test_the_python_blocks_of_a_document_run_from_top_to_bottom(path: Path) -> None:
    code = of_small_runs(shortened("\n".join(blocks(text_of(path), "python"))))
    exec(compile(code, path.name, "exec"), {})  # noqa: S102


def cells_of_the_notebook() -> list[str]:
    notebook = json.loads(text_of(REPOSITORY / "notebooks/training_in_python.ipynb"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.usefixtures("reader")
def test_the_cells_of_the_notebook_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments of a kernel, in a checkout. They are the blocks of docs/python.md."""
    monkeypatch.setattr("sys.argv", ["ipykernel_launcher.py", "-f", "kernel-1.json"])
    names: dict[str, object] = {}
    for cell in cells_of_the_notebook():
        for _ in range(2):
            exec(compile(shortened(cell), "cell", "exec"), names)  # noqa: S102


def test_the_notebook_installs_the_repository_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], *, check: bool) -> None:
        commands.append(command)
        Path("ddpm_hf_checkout").mkdir(exist_ok=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    installation = cells_of_the_notebook()[0]
    with pytest.raises(SystemExit, match="REPOSITORY is empty"):
        exec(compile(installation, "cell", "exec"), {})  # noqa: S102
    exec(compile(installation.replace('REPOSITORY = ""', 'REPOSITORY = "address"'), "cell", "exec"), {})  # noqa: S102
    checkout = str(tmp_path / "ddpm_hf_checkout")
    assert commands == [
        ["git", "clone", "--quiet", "--depth", "1", "address", checkout],
        [sys.executable, "-m", "pip", "install", "--quiet", checkout],
    ]
    assert str(Path.cwd()) == checkout


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(text_of(path), "yaml")], ids=lambda p: p.name)
def test_the_yaml_blocks_of_a_document_are_configurations(path: Path, tmp_path: Path) -> None:
    for block in blocks(text_of(path), "yaml"):
        (tmp_path / "config.yaml").write_text(block, encoding="utf-8")
        parse_command_line(["--config", str(tmp_path / "config.yaml")])


# -------------------------------------------------------------------------------------------- links and references


def anchors_of(document: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ +(.*?) *$", FENCED.sub("", document), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_and_anchors_resolve(path: Path) -> None:
    text = FENCED.sub("", text_of(path))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not re.match(r"[a-z]+:", target) and (
            not file.exists() or (anchor and anchor not in anchors_of(text_of(file)))
        ):
            broken.append(target)
    assert broken == []


def test_the_chinese_readme_has_the_code_the_links_and_the_numbers_of_the_english_one() -> None:
    english, chinese = (text_of(path) for path in (REPOSITORY / "README.md", CHINESE))
    assert [line.partition("#")[0] for line in commands_of(CHINESE)] == [
        line.partition("#")[0] for line in commands_of(REPOSITORY / "README.md")
    ]
    assert blocks(chinese, "python") == blocks(english, "python")
    assert blocks(chinese, "") == blocks(english, "")
    english = re.sub(r"([\d.]+) million", lambda found: f"{float(found[1]) * 100:g} 万", english)
    for pattern in (r"\]\(([^)\s]+)\)", r"(?<![\w.])\d[\d,.]*(?:e-\d+)?(?<![.,])"):
        found = [set(re.findall(pattern, FENCED.sub("", text))) for text in (english, chinese)]
        assert found[0] ^ found[1] <= {"README.md", "README_zh.md"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_that_a_document_names_exist(path: Path) -> None:
    named = re.findall(r"`(?:python )?((?:\.ci|benchmarks|configs|ddpm_hf|docs|tests)/[\w/.*]+)", text_of(path))
    assert [name for name in named if not list(REPOSITORY.glob(name))] == []


@pytest.mark.parametrize(
    "name", ["README", "docs/coming_from", "docs/python", "docs/sampling", "docs/training", "docs/troubleshooting"]
)
def test_the_settings_that_a_document_names_exist(name: str) -> None:
    sections = RunConfig().to_dict()
    text = text_of(REPOSITORY / f"{name}.md")
    named = re.findall(rf"`(?:--)?({'|'.join(sections)})\.([a-z0-9_]+)(?=[ `])", text)
    assert [(section, setting) for section, setting in named if setting not in sections[section]] == []


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("make_training", "docs/settings.md"),
        ("make_performance", "docs/performance.md"),
        ("make_notebook", "notebooks/training_in_python.ipynb"),
    ],
)
def test_a_generated_document_is_up_to_date(script: str, name: str) -> None:
    generated = runpy.run_path(str(REPOSITORY / "docs" / f"{script}.py"))["document"]()
    assert generated == text_of(REPOSITORY / name), f"run python docs/{script}.py"


def test_the_runs_behind_the_pictures_of_symptoms_are_accepted(tmp_path: Path) -> None:
    script = runpy.run_path(str(REPOSITORY / "docs/make_troubleshooting.py"))
    for name in script["RUNS"]:
        parse_command_line(script["options_of"](name, tmp_path))


@pytest.mark.parametrize("name", ["SECURITY.md", "docs/reliability.md", "docs/compatibility.md"])
def test_every_test_that_a_document_names_exists(name: str) -> None:
    written = {
        test
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        for test in re.findall(r"def (test_\w+)", text_of(path))
    }
    named = set(re.findall(r"`(test_\w+)`", text_of(REPOSITORY / name)))
    of_diffusers = {"betas", "from_pretrained", "full_loop_with_noise", "trained_betas", "variance_type"}
    assert named
    assert sorted(named - written - {f"test_{test}" for test in of_diffusers}) == []


def test_every_function_that_the_mathematics_names_exists() -> None:
    links = re.findall(r"\[`[\w/]+\.py::([\w.]+)`\]\(\.\./([\w/]+\.py)\)", text_of(REPOSITORY / "docs/mathematics.md"))
    assert links
    for name, file in links:
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b", text_of(REPOSITORY / file), re.MULTILINE), (file, name)
