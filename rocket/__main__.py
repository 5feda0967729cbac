"""`python -m rocket`."""

import sys

from rocket.lab.cli import main

sys.exit(main())
