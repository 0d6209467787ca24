"""Checks of deltaspec on a CUDA device: `make check-cuda`. docs/cuda.md says how, and keeps the table."""
