"""Attention next to torch's on one GPU: cells, backends, timing, tables, pictures."""
