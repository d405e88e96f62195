"""The card of a model: README.md of the folder that is uploaded, for people who have never heard of the project.

Everything in it is read from the files of the folder, so the same folder gives the same card. A card that is on the Hub
already is brought up to date without losing a line that somebody wrote there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils.hub_utils import MODEL_CARD_TEMPLATE_PATH
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from ddpm_hf.hub.card_body import has_marks, merged_body, section
from ddpm_hf.hub.card_facts import read_facts
from ddpm_hf.hub.card_front_matter import MODEL_INDEX, merged_front_matter, new_front_matter, split_front_matter
from ddpm_hf.hub.card_metadata import metadata
from ddpm_hf.hub.card_text import license_text, render

FILE_NAME = "README.md"
METADATA, LICENSE = "metadata", "license"
"""What `Card.kept` calls a YAML that cannot be read, and a license that differs from the one that was asked for."""
# The comment in the card of diffusers' training scripts with the title below it, and the sentence of its push_to_hub.
_OF_TRAINING_SCRIPTS = re.compile(r"\s*<!-- This model card has been generated automatically[^>]*-->\s*(# .*)?")
_OF_PUSH_TO_HUB = re.compile(r"This is the model card of a 🧨 diffusers \w+ that has been pushed on the Hub\..*")
_UNCLOSED = re.compile(r"\s*---[ \t]*\r?\n[\w-]+:")
# What a card that somebody wrote alone is given: enough to be found, loaded and compared.
_FOR_OTHERS = ("library_name", "pipeline_tag", "tags", MODEL_INDEX)


@dataclass(frozen=True)
class Card:
    """A card and what in it is somebody's.

    Args:
        text: README.md.
        kept: What stays of the card that was there because somebody edited it: names of sections, `metadata` and
            `license`, or README.md where nothing in it was ours.
    """

    text: str
    kept: tuple[str, ...] = ()


def make_card(folder: Path, *, repo_id: str, license: str | None = None, existing: str | None = None) -> Card:
    """Writes the card of a folder that is going to be uploaded.

    Args:
        folder: A saved pipeline, and where there are any training_config.yaml, training_summary.json, evaluation.json,
            verification.json and pictures in samples/.
        repo_id: The repository it goes to.
        license: Identifier of the license of the weights; None leaves the one in `existing`, or else says `unknown`.
        existing: The card that is there already.

    Raises:
        ValueError: The folder holds no pipeline or a broken file, or an argument is none that the Hub knows.
    """
    validate_repo_id(repo_id)
    facts = read_facts(folder, repo_id)
    existing = (existing or "").removeprefix("\ufeff")
    line_break = "\r\n" if "\r\n" in existing else "\n"
    front, body = split_front_matter(existing)
    if _is_automatic(body):
        body = ""
    is_ours = has_marks(body) or not body.strip()
    new = metadata(facts, license)
    if not is_ours:
        new = {key: new[key] for key in (*_FOR_OTHERS, *([LICENSE] if license else [])) if key in new}
    if front:
        stays = [*([] if license else [LICENSE]), *([] if is_ours else ["tags"])]
        merged = merged_front_matter(front, new, stays)
    else:
        merged = None if _UNCLOSED.match(existing) else (new_front_matter(new, line_break), new)
    head: str = merged[0] if merged else front
    data: Mapping[str, Any] = merged[1] if merged else {}
    kept = [] if merged else [METADATA]
    if license and data.get(LICENSE) != license:
        kept.append(LICENSE)
    if not is_ours:
        return Card(head + body, (*kept, FILE_NAME))
    sections = render(facts, license=license_text(data))
    if not has_marks(body):
        text = "\n" + "\n".join(section(name, content) for name, content in sections.items())
        return Card(head + text.replace("\n", line_break), tuple(kept))
    body, edited = merged_body(body, sections)
    return Card(head + body, (*kept, *edited))


def _is_automatic(body: str) -> bool:
    """Whether diffusers wrote a card and nobody anything in it: each line is one of its template, or the title."""
    if trained := _OF_TRAINING_SCRIPTS.match(body):
        description, template_path = trained[1] or "", str(MODEL_CARD_TEMPLATE_PATH)
    elif pushed := _OF_PUSH_TO_HUB.search(body):
        description, template_path = pushed[0], None
    else:
        return False
    template = ModelCard.from_template(ModelCardData(), template_path=template_path, model_description=description).text
    written = {line.strip() for line in template.splitlines()}
    return all(line.strip() in written for line in body.splitlines())
