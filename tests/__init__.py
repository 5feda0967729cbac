"""The tests; none of their programs compiles again what another one has compiled."""

import os
import sys
from pathlib import Path

if sys.dont_write_bytecode:
    # As in many containers. Each of 150 programs would compile all that it imports, so they get a place for that.
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode = False
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
