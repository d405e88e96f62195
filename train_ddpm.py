# /// script
# requires-python = ">=3.10"
# dependencies = ["ddpm_hf[recognition]"]
#
# [tool.uv.sources]
# ddpm_hf = { path = ".", editable = true }
# ///
"""Train a DDPM: accelerate launch train_ddpm.py --config configs/digits_8.yaml.

`uv run train_ddpm.py --config ...` needs no environment: uv makes one from the lines above.
"""

import sys

from ddpm_hf.cli.main import train

if __name__ == "__main__":
    sys.exit(train(prog="train_ddpm.py"))
