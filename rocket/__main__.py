"""`python -m rocket`."""

import sys

from rocket.cli import main

sys.exit(main())
