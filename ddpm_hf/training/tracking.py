"""metrics.jsonl: one line of JSON a log interval, whole after any kill, cut back to the checkpoint on resume."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_hf.training.checkpoint import replace_file


class MetricsLog:
    """Appends to and reads metrics.jsonl.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, row: Mapping[str, float | int | None]) -> None:
        """Writes one line, at once readable by others."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Returns all whole lines; a last line that a kill tore is left out."""
        if not self._path.exists():
            return []
        rows = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def cut_after(self, step: int) -> None:
        """Forgets what came after a step, since the run is about to do it again."""
        rows = [row for row in self.rows() if row["step"] <= step]
        replace_file(self._path, "".join(json.dumps(row) + "\n" for row in rows))
