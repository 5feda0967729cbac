"""What a running system is like, for people in a terminal and for programs."""
