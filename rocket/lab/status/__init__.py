"""The command `status`: a running system, shown to people in a terminal and to programs."""
