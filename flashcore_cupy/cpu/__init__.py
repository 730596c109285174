"""The same semantics on NumPy arrays: the tiled attention, and the float64 oracle."""
