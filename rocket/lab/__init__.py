"""What shows, proves and measures the router: the demonstration, torture, the checker, the benchmark."""
