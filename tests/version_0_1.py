"""What version 0.1 wrote, unpacked from version_0_1.zip.

RUN is the folder of a run that stopped after step 3 of 6, SAVED the pipeline that the same run saved after step 6, and
METRICS the metrics.jsonl that it had written by then.
"""

import tempfile
import zipfile
from pathlib import Path

_FOLDER = tempfile.TemporaryDirectory(prefix="ddpm_hf-version-0.1-")
with zipfile.ZipFile(Path(__file__).with_suffix(".zip")) as _archive:
    _archive.extractall(_FOLDER.name)

RUN = Path(_FOLDER.name) / "run_0_1"
SAVED = Path(_FOLDER.name) / "saved_0_1"
METRICS = Path(_FOLDER.name) / "metrics_0_1.jsonl"
