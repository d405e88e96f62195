"""What the documents say can be typed, run and followed: commands, code, configurations and links."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from ddpm_hf import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.cli import main
from ddpm_hf.cli.evaluate import parse
from ddpm_hf.config import EvaluationConfig, load_config
from ddpm_hf.evaluation.metrics import METRICS
from tests import documents
from tests.conftest import REPOSITORY
from tests.documents import CHECKS, DOCUMENTS, FENCED, Refused, blocks, text_of

DOCS = REPOSITORY / "docs"
COMMANDS = list(documents.commands_of_documents())
BLOCKS = {
    language: [(path, block) for path in DOCUMENTS for block in blocks(text_of(path), language)]
    for language in ("python", "yaml")
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the reader is."""
    monkeypatch.chdir(REPOSITORY)


# ------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{command.where}: {command.line}" for command in COMMANDS])
def test_every_command_of_the_documents_and_recipes_is_accepted(command: documents.Command) -> None:
    """As a dry run, by the parsers of the programs: what a command does is the matter of its own tests."""
    documents.check(command.line)


def test_what_the_sentences_mention_exists() -> None:
    mentions = {mention.line for mention in documents.mentions_of_documents()}
    assert len(mentions) > 10
    for line in sorted(mentions):
        documents.check_mention(line)


def test_commands_are_found_where_they_are() -> None:
    """At least one in each of these, so that none is passed over because it is written otherwise."""
    found = {command.where for command in COMMANDS}
    assert found >= {"README.md", "CONTRIBUTING.md", "data.md", "evaluation.md", "scaling.md", "training.md"}
    assert found >= {path.name for path in documents.RECIPES}


def test_there_is_a_check_for_every_command_of_the_program() -> None:
    assert set(main.COMMANDS) == set(CHECKS)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_help_has_examples_that_are_accepted(name: str) -> None:
    """Of `ddpm-hf plot` each kind of picture has a help of its own."""
    texts = [documents.help_of(name)]
    kinds = re.findall(r"^usage: .* \{([\w,]+)\} \.\.\.$", texts[0], re.MULTILINE)
    texts += [documents.help_of(name, kind) for names in kinds for kind in names.split(",")]
    for text in texts:
        examples = documents.examples_of_help(text)
        assert examples
        for example in examples:
            documents.check(example)


@pytest.mark.parametrize(
    "line",
    [
        "ddpm-hf paint outputs/digits",
        "ddpm-hf verify outputs/digits/pipeline --thoroughly",
        "ddpm-hf evaluate outputs/digits --data x --metrics beauty",
        "ddpm-hf train --config configs/no_such_recipe.yaml",
        "accelerate launch --quite train_ddpm.py --config configs/digits_8.yaml",
        "accelerate launch train_ddpm.py --config configs/digits_8.yaml --training.num_stepz 5",
        "ddpm-hf evaluate outputs/digits --data data/digits.parquet --metrics fid",
        "ddpm-hf evaluate outputs/cifar10 --data uoft-cs/cifar10 --metrics fid --num_samples 2048",
        "torchrun --nproc_per_node 2 -m ddpm_hf evaluate --metrics fid",
        "python train_ddpm.py --config configs/digits_8.yaml --training.micro_batch_size 48",
        "python benchmarks/editing.py",
        "python benchmarks/painting.py",
        "make tests",
        "make train ARG=1",
        'make train ARGS="--training.num_stepz 5"',
        "pip install -e .[everything]",
        "pytest tests/unit/test_nothing.py",
        "cd docs && make all",
        "rm -rf outputs",
        "--objective.loss beautiful",
    ],
)
def test_a_wrong_command_would_be_noticed(line: str) -> None:
    with pytest.raises((Refused, ValueError, SystemExit)):
        documents.check(line)


@pytest.mark.parametrize("line", ["ddpm-hf paint", "ddpm-hf evaluate --beauty", "make all", "python train.py"])
def test_a_wrong_mention_would_be_noticed(line: str) -> None:
    with pytest.raises(Refused):
        documents.check_mention(line)


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_dry_run_of_the_training_document_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, as there; an ellipsis stands for any lines."""
    (shown,) = re.findall(r"^\$ python train_ddpm\.py (.* --dry_run)\n(.*)", _transcripts(), re.MULTILINE | re.DOTALL)
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    assert main.train([*shlex.split(shown[0]), "--training.cpu", "true"]) == 0
    rest = capsys.readouterr().out
    for part in shown[1].split("...\n"):
        before, found, rest = rest.partition(part.strip())
        assert found, before


def _transcripts() -> str:
    """The one transcript of a dry run."""
    (block,) = [block for block in blocks(text_of(DOCS / "training.md"), "") if "--dry_run\n" in block]
    return block


# ----------------------------------------------------------------------------------------------------------- code


def save_model(folder: Path, names: list[str]) -> None:
    """Saves a small class-conditional model with these classes."""
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
    pipe = GaussianDiffusionPipeline(unet, GaussianDiffusionScheduler(), class_names=class_names, has_null_label=True)
    pipe.save_pretrained(folder)


def run_python(path: Path, replaced: dict[str, str], space: dict[str, object]) -> dict[str, object]:
    """Runs the Python blocks of a document from top to bottom, with other names in place of those that are there."""
    code = "\n".join(blocks(text_of(path), "python"))
    for old, new in replaced.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(compile(code, path.name, "exec"), space)  # noqa: S102
    return space


def test_the_code_of_the_sampling_document_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the folder of a small class-conditional model in the place of the repository that it names."""
    save_model(tmp_path / "model", ["cat", "dog"])
    monkeypatch.chdir(tmp_path)
    assert len(blocks(text_of(DOCS / "sampling.md"), "python")) >= 10
    space = run_python(DOCS / "sampling.md", {'"user/model"': '"model"'}, {})
    for name in ("first.png", "strip.png", "denoising.gif"):
        assert (tmp_path / name).stat().st_size > 0
    assert len(space["between"]) == 8  # type: ignore[arg-type]


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model where `make train` puts one."""
    save_model(tmp_path / "outputs/digits/pipeline", [str(digit) for digit in range(10)])
    monkeypatch.chdir(tmp_path)
    assert len(run_python(REPOSITORY / "README.md", {}, {})["images"]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_of_code_is_python(path: Path) -> None:
    for block in blocks(text_of(path), "python"):
        compile(block, path.name, "exec")


@pytest.mark.parametrize(("path", "block"), BLOCKS["yaml"], ids=[path.name for path, _ in BLOCKS["yaml"]])
def test_every_block_of_yaml_is_a_configuration(tmp_path: Path, path: Path, block: str) -> None:
    """Of a run whose other settings are the defaults."""
    (tmp_path / "config.yaml").write_text(block, encoding="utf-8")
    load_config(["--config", str(tmp_path / "config.yaml")])


def test_the_evaluation_document_names_what_there_is() -> None:
    document = text_of(DOCS / "evaluation.md")
    assert set(re.findall(r"^\| `(\w+)` \|", document, re.M)) >= set(METRICS)
    assert set(re.findall(r"evaluation\.(score_\w+)", document)) <= set(EvaluationConfig.__dataclass_fields__)
    flags = {f"--{name}" for name in vars(parse(["x", "--data", "y"]))} | {
        "--write",
        "--trust_remote_code",
    }  # of verify
    named = set(re.findall(r"`(--\w+)(?=[ `])", document))
    assert named - {"--data"} <= flags


# ---------------------------------------------------------------------------------------------------------- links


def anchors_of(document: str) -> set[str]:
    """Returns the names that GitHub gives the headings of a document."""
    anchors: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.*?) *$", FENCED.sub("", document), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        anchors[anchor] = anchors.get(anchor, -1) + 1
    return {f"{anchor}-{i}" if i else anchor for anchor, last in anchors.items() for i in range(last + 1)}


def broken_links(path: Path, document: str) -> list[str]:
    """Returns the relative links of a document to what is not there."""
    text = FENCED.sub("", document)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors_of(document if file == path else text_of(file))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_inside_the_repository_leads_somewhere(path: Path) -> None:
    assert broken_links(path, text_of(path)) == []


def test_a_broken_link_would_be_noticed() -> None:
    """Headings are named as GitHub does it, a second one of the same name with a number."""
    document = (
        "# `A`: what, and *how*?\n\n# Twice\n# Twice\n[1](no.md) [2](#twice-1) [3](#a-what-and-how) [4](#twice-2)"
        " ![5](docs/no.png) [6](docs/data.md#no-such-part) [7](docs/data.md) [8](https://example.org/x.md)"
    )
    broken = broken_links(REPOSITORY / "README.md", document)
    assert broken == ["no.md", "#twice-2", "docs/no.png", "docs/data.md#no-such-part"]
