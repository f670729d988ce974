"""``python -m laser_callback`` is ``laser-callback``."""

import sys

from laser_callback.cli.commands import main

sys.exit(main())
