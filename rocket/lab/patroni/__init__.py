"""A cluster that Patroni runs on this machine, to play with and to torture."""
