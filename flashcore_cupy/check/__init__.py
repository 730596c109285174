"""Is it right: the acceptance rule, expected values, the correctness matrix."""
