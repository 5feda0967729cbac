"""A local Postgres cluster, a primary and its streaming replicas, as subprocesses of this program."""
