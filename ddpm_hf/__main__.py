"""`python -m ddpm_hf` runs `ddpm-hf`."""

import sys

from ddpm_hf.cli.main import main

sys.exit(main())
