"""`python -m kd_lightning`: the same as `kd-lightning`."""

import sys

from kd_lightning.cli.program import main

sys.exit(main())
