"""Triton kernels for weights of a few bits.

The package imports torch and triton and nothing of `lowbit`, which in turn imports it lazily and in
one place only (`lowbit/ops.py`): lowbit installs and works where there is no GPU and no Triton.
Every kernel has a naive twin in plain PyTorch that is its specification.
"""
