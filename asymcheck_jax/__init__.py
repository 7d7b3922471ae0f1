"""The place of the JAX and Orbax adapter, which is not written yet."""
