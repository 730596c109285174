"""torch and JAX: gradients and traces. Imported only when their arrays need them."""
