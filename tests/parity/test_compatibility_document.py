"""docs/compatibility.md promises what tests hold: each test that it names exists."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
OF_DIFFUSERS = {
    "test_betas",
    "test_trained_betas",
    "test_variance_type",
    "test_full_loop_with_noise",
    "test_from_pretrained",
}


def test_every_test_that_the_document_names_exists() -> None:
    document = (REPOSITORY / "docs" / "compatibility.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", document))
    written: set[str] = set()
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        written.update(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(named) > 30
    assert named - written == OF_DIFFUSERS
