"""Run the command as ``python -m outlast.cli``."""

import sys

from outlast.cli import main

sys.exit(main())
