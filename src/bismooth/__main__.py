"""``python -m bismooth`` is the command ``bismooth``."""

import sys

from .tools.cli import main

sys.exit(main())
