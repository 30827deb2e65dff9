"""Output of a run: the terminal, notebooks, report.html, and sinks for other tools."""
