"""``python -m bismooth`` is the command ``bismooth``."""

import sys

from .tools.entry import main

sys.exit(main())
