"""Benchmarks of yoto_jax: `python -m benchmarks` lists them."""
