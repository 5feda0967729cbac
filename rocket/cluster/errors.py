"""What can go wrong with a local cluster, one class for each fact that a caller can act on."""

from __future__ import annotations

from rocket.errors import RocketError, SetupError

# --- what was asked for cannot be had: the commands end with one line and exit code 2 ---


class BinariesNotFound(SetupError):
    """No usable Postgres server programs at the place named."""


class PortInUse(SetupError):
    """A TCP port that was asked for by number is in use by another program, or reserved by it."""


class NotOurDirectory(SetupError):
    """The data directory holds something that rocket did not make; nothing in it was touched."""


class DirectoryUnusable(SetupError):
    """The data directory cannot be made, entered or written."""


class ClusterInUse(SetupError):
    """Another live process already runs the cluster of this data directory."""


class ClusterNotFound(SetupError):
    """No running cluster has the data directory or port that was named."""


class PrimaryLeftOut(SetupError):
    """The node that is the primary of a kept directory is missing, or not among those asked for."""


class NoSuchNode(SetupError):
    """The cluster has no node of that name."""


# --- the servers ---


class CommandFailed(RocketError):
    """A program (initdb, pg_basebackup) failed or took too long; carries its output's tail."""


class ServerFailedToStart(RocketError):
    """A Postgres server died, or did not answer in time, while it started; carries the tail of its log."""


class ServerKeepsDying(RocketError):
    """A server that the others cannot do without died so often by itself that it is not started again."""


class NotAReplica(RocketError):
    """What was asked for makes sense on a replica only."""


class NodeNotRunning(RocketError):
    """What was asked for needs a node that is up, and this one is not."""


class NodeFrozen(NodeNotRunning):
    """What was asked for needs a node, or one of its processes, that is halted."""


class NotThePrimary(RocketError):
    """A node that should take writes is in recovery."""


class PromotionFailed(RocketError):
    """A replica could not be made the primary; says who is the primary now."""


class Refused(RocketError):
    """The running cluster did not do what it was asked to."""


class NotHealed(RocketError):
    """A node is not back to normal; says which, and why."""
