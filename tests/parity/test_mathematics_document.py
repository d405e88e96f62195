"""docs/mathematics.md: every function that stands beside an equation exists, and none of the algebra is left out."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = (REPOSITORY / "docs" / "mathematics.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[`([\w/]+\.py)::([\w.]+)`\]\(\.\./([\w/]+\.py)\)", DOCUMENT)
EXPLAINED = (
    "diffusion/noise_schedule", "diffusion/timesteps", "diffusion/gaussian", "diffusion/forward_process",
    "diffusion/reverse_variance", "training/power_function", "training/weighting", "training/timestep_sampling",
    "evaluation/frechet",
)  # fmt: skip
PLUMBING = {
    "SamplingRun.row", "ForwardProcess.split_variance", "find_second_moments", "second_moments_file",
    "ReverseVariance.eps_second_moments",
    "ReverseVariance.analytic_variance", "ReverseVariance.save_second_moments", "ReverseVariance.load_second_moments",
    "loss_weight", "build_timestep_sampler", "LossAwareTimesteps.record", "LossAwareTimesteps.state",
    "LossAwareTimesteps.load_state", "TimestepSampler.draw", "TimestepSampler.record", "TimestepSampler.state",
    "TimestepSampler.load_state",
}  # fmt: skip


def names_in(path: Path) -> set[str]:
    """Classes, functions and Class.method of a module."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))
    return names


def test_every_function_that_the_document_names_exists() -> None:
    assert len(LINKS) > 40
    assert len(LINKS) == DOCUMENT.count(".py::"), "each is a link"
    for module, name, target in LINKS:
        assert target.split("/")[-1] == module
        assert name in names_in(REPOSITORY / target), (target, name)


@pytest.mark.parametrize("module", EXPLAINED)
def test_every_public_function_of_the_algebra_is_in_the_document(module: str) -> None:
    path = REPOSITORY / "ddpm_hf" / f"{module}.py"
    functions = {
        node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    }
    public = {name for name in names_in(path) if name.split(".")[-1] in functions and "_" not in (name[0], name[-1])}
    public = {name for name in public if not name.split(".")[-1].startswith("_")} - PLUMBING
    named = {name for _, name, target in LINKS if target == f"ddpm_hf/{module}.py"}
    assert public
    assert public <= named


def test_every_schedule_and_option_of_the_variance_is_in_the_document() -> None:
    from ddpm_hf.diffusion.forward_process import CHOICES
    from ddpm_hf.diffusion.noise_schedule import BETA_SCHEDULE_ALIASES, BETA_SCHEDULES

    for name in (*BETA_SCHEDULES, *BETA_SCHEDULE_ALIASES, *CHOICES["variance_type"]):
        assert f"`{name}`" in DOCUMENT, name


def test_every_paper_that_the_document_cites_is_in_its_list() -> None:
    text, papers = DOCUMENT.split("## Papers")
    cited = set(re.findall(r"([A-Z][\w-]+)(?: et al\.| and [A-Z]\w+) (20\d\d)", text))
    listed = set(re.findall(r"^- ([A-Z][\w-]+)[^\n]*? (20\d\d)", papers, re.MULTILINE))
    assert cited <= listed, cited - listed
    assert {author for author, _ in cited} >= {"Ho", "Song", "Nichol", "Salimans", "Lin", "Lugmayr"}


def test_no_section_stands_twice() -> None:
    sections = re.findall(r"^## (.*)$", DOCUMENT, re.MULTILINE)
    assert len(sections) == len(set(sections))
    assert {"Averages", "Timestep sampling", "Metrics", "Self-conditioning"} <= set(sections)


def test_formulas_are_closed() -> None:
    """An unclosed one swallows the rest of the page."""
    assert DOCUMENT.count("$$") % 2 == 0
    for line in re.sub(r"\$\$.*?\$\$", "", DOCUMENT, flags=re.DOTALL).splitlines():
        assert line.count("$") % 2 == 0, line
