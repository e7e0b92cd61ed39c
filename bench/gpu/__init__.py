"""Benches of kernels and transfers on a GPU, each figure a share of a ceiling of the same run. Skipped without one."""
