"""A local Postgres cluster by itself: `python cluster.py up`, and commands that act on a running one."""

import sys

from rocket.lab.cli import cluster_main

if __name__ == "__main__":
    sys.exit(cluster_main())
