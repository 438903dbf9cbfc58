"""Tools for those who work on yoto_jax: no part of the package."""
