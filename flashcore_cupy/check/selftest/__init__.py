"""The correctness matrix: its cases, their arrays, and how they run."""
