"""``python -m devguard`` is the ``devguard`` command."""

import sys

from devguard.cli import main

sys.exit(main())
