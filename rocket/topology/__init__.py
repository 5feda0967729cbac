"""Where a router's nodes are: listed in a file, or by Patroni, and followed while the router is open."""
