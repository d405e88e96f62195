"""Train a DDPM: accelerate launch train_ddpm.py --config configs/digits_8.yaml."""

import sys

from ddpm_hf.cli.main import train

if __name__ == "__main__":
    sys.exit(train(prog="train_ddpm.py"))
