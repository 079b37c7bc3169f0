"""Run the ``devguard`` command: ``python -m devguard``."""

import sys

from devguard.cli import main

sys.exit(main())
