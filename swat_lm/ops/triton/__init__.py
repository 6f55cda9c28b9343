"""Kernels of windowed attention for NVIDIA GPUs, written in Triton; docs/kernels.md is their mathematics.

Importing this package does not import triton: `availability` says whether it can be, and the files with kernels are
imported by the dispatcher on first use.
"""
