"""The YAML at the head of a card: what is ours in it is renewed, what somebody changed or added stays, line by line.

What was written is remembered in a comment of the YAML, as short hashes of every value and of every entry of a list. An
entry that is there but not remembered is somebody's; one that is remembered but not there was taken out by somebody.
"""

import copy
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import yaml

MODEL_INDEX = "model-index"
_RECORD = "# ddpm_hf wrote: "
# As the Hub finds it, but for an empty one.
_FRONT_MATTER = re.compile(r"(\s*---(?:\r\n|\r|\n))([\s\S]*?)((?:(?:\r\n|\r|\n)|(?<=\n))---[ \t]*(?:\r\n|\n|$))")
_KEY = re.compile(r"""(?:"([^"]+)"|'([^']+)'|([^\s#'"\[\]{}&*!|>%@`,?-][^#]*?))\s*:(?:\s|$)""")

Record = dict[str, list[str]]


def split_front_matter(text: str) -> tuple[str, str]:
    """Returns the YAML with the lines around it, empty where there is none, and the rest."""
    found = _FRONT_MATTER.match(text)
    return (found[0], text[found.end() :]) if found else ("", text)


def new_front_matter(data: Mapping[str, Any], line_break: str = "\n") -> str:
    """Returns the head of a card that had none."""
    return f"---\n{_dump(data)}\n{_record_line(_hashes(data))}\n---\n".replace("\n", line_break)


def merged_front_matter(
    front: str, new: Mapping[str, Any], stays: Collection[str] = ()
) -> tuple[str, dict[str, Any]] | None:
    """Renews the head of a card.

    Args:
        front: The head as it is, with any line breaks.
        new: The metadata of today.
        stays: Keys that are left as they are where they are there, whoever wrote them.

    Returns:
        The head and its content; None where it is broken, and must stay as it is.
    """
    found = _FRONT_MATTER.match(front)
    assert found is not None
    opening, text, closing = found.groups()
    lines = text.replace("\r\n", "\n").split("\n")
    records = [line for line in lines if line.startswith(_RECORD)]
    try:
        before = yaml.safe_load(text) or {}
        record = json.loads(records[-1].removeprefix(_RECORD)) if records else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    chunks = _chunks([line for line in lines if line not in records])
    keys = [key for key, _ in chunks if key is not None]
    if not isinstance(before, dict) or sorted(keys) != sorted(map(str, before)) or not _is_record(record):
        return None
    after = _merged(before, new, record, stays)
    for key in [key for key in {**before, **after} if before.get(key) != after.get(key)]:
        ours = _dump({key: after[key]}).split("\n") if key in after else []
        if key in before:
            place = next(number for number, (name, _) in enumerate(chunks) if name == key)
            chunks[place] = (key, [*_comments(chunks[place][1], {key: before[key]}), *ours])
        else:
            chunks.append((key, ours))
    written = [line for _, chunk in chunks for line in chunk]
    # What was written and taken out by somebody is remembered, so that it is not written again.
    remembered = {key: hashes for key, hashes in record.items() if key not in before or key in stays}
    renewed = {key: value for key, value in new.items() if key not in before or key not in stays}
    result = "\n".join([*written, _record_line(remembered | _hashes(renewed))])
    # What somebody wrote in a form that is not read above stays, rather than being written wrongly.
    try:
        if (yaml.safe_load(result) or {}) != after:
            return None
    except yaml.YAMLError:
        return None
    line_break = "\r\n" if "\r\n" in front else "\n"
    # An empty head has no line break before its last line, and the last line may end with the text.
    closing = line_break + closing.lstrip("\r\n") + ("" if closing.endswith("\n") else line_break)
    return opening + result.replace("\n", line_break) + closing, after


def _comments(lines: list[str], content: Mapping[str, Any]) -> list[str]:
    """Returns the comments and empty lines in the lines of a key, each as a line of its own."""
    ours = _dump(content).split("\n")
    comments = [line for line in lines if line not in ours and (not line.strip() or "#" in line)]
    return [line if line.lstrip()[:1] in ("#", "") else line[line.index("#") :] for line in comments]


def _is_record(record: Any) -> bool:
    """Whether a record has the form that is written."""
    return isinstance(record, dict) and all(isinstance(hashes, list) for hashes in record.values())


def _chunks(lines: list[str]) -> list[tuple[str | None, list[str]]]:
    """Returns the lines by top-level key; comments before a key go with it, those after the last one with none."""
    chunks: list[tuple[str | None, list[str]]] = []
    waiting: list[str] = []
    for line in lines:
        key = _KEY.match(line)
        if key:
            chunks.append((next(filter(None, key.groups())), [*waiting, line]))
            waiting = []
        elif not line.strip() or line.startswith("#"):
            waiting.append(line)
        elif chunks:
            chunks[-1] = (chunks[-1][0], [*chunks[-1][1], *waiting, line])
            waiting = []
        else:
            waiting.append(line)
    # The empty line is that of a text without lines.
    return [*chunks, (None, [line for line in waiting if line])] if waiting != [""] else chunks


def _merged(
    before: Mapping[str, Any], new: Mapping[str, Any], record: Record, stays: Collection[str]
) -> dict[str, Any]:
    """Returns the metadata that a card has now."""
    after = dict(before)
    ours = [*new, *(key for key in record if key not in new and key in before)]
    for key in [key for key in ours if key not in before or key not in stays]:
        known = set(record.get(key, ()))
        if key not in before:
            # A key that was written and is gone was taken out.
            if not known:
                after[key] = new[key]
            continue
        if key == MODEL_INDEX:
            value = _merged_index(before[key], new.get(key), known)
        elif isinstance(before[key], list):
            value = _merged_list(before[key], new.get(key, []), known)
        else:
            value = new.get(key) if _hash(before[key]) in known else before[key]
        after[key] = value
        if value is None or value == []:
            del after[key]
    return after


def _merged_list(before: list[Any], new: list[Any], known: set[str]) -> list[Any]:
    """Returns a list with our entries renewed."""
    staying = [entry for entry in before if entry in new or _hash(entry) not in known]
    return staying + [entry for entry in new if entry not in before and _hash(entry) not in known]


def _merged_index(before: Any, new: list[dict[str, Any]] | None, known: set[str]) -> Any:
    """Returns the model-index with our numbers renewed; a number that somebody changed stands for ours."""
    index = copy.deepcopy(before)
    try:
        for model in index:
            for result in model["results"]:
                result["metrics"] = [one for one in result["metrics"] if _hash_of_metric(result, one) not in known]
            model["results"] = [result for result in model["results"] if result["metrics"]]
        theirs = {_identity(result, one) for model in index for result in model["results"] for one in result["metrics"]}
        ours = copy.deepcopy(new[0]["results"]) if new else []
        for result in ours:
            result["metrics"] = [one for one in result["metrics"] if _identity(result, one) not in theirs]
        index[0]["results"] += [result for result in ours if result["metrics"]]
    except (KeyError, TypeError, AttributeError, IndexError):
        return before
    return [model for model in index if model["results"]]


def _identity(result: Mapping[str, Any], metric: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns what a number is of, whatever it is."""
    dataset = result["dataset"]
    named = (result["task"]["type"], dataset["type"], dataset.get("split"), metric["type"], metric.get("name"))
    return tuple(map(str, named))


def _hash_of_metric(result: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """Returns the hash of one number with all that is said of it."""
    return _hash([result["task"], result["dataset"], metric])


def _hash(value: Any) -> str:
    """Returns a short hash of a value of YAML, whatever the order of its keys; an empty one of what is never ours."""
    try:
        text = json.dumps(value, sort_keys=True, default=str)
    except (TypeError, ValueError, RecursionError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _hashes(data: Mapping[str, Any]) -> Record:
    """Returns the hashes of all values, of a list those of its entries."""
    record: Record = {}
    for key, value in data.items():
        if key == MODEL_INDEX:
            record[key] = [_hash_of_metric(result, one) for result in value[0]["results"] for one in result["metrics"]]
        else:
            record[key] = [_hash(entry) for entry in value] if isinstance(value, list) else [_hash(value)]
    return record


def _record_line(record: Record) -> str:
    """Returns the comment that says what was written."""
    return _RECORD + json.dumps(record, sort_keys=True)


def _dump(data: Mapping[str, Any]) -> str:
    """Returns YAML as huggingface_hub writes it, with no line break at its end."""
    return str(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)).strip()
