"""`python -m ddpm_hf` is the command `ddpm-hf`."""

import sys

from ddpm_hf.cli.main import main

sys.exit(main())
