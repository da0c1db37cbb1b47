"""Entry of ``python -m megamoe``."""

import sys

from megamoe.cli import main

sys.exit(main())
