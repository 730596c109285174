"""How fast: latency, peak rates, the ladder."""
