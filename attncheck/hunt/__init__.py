"""Adversarial generation: cases that nobody wrote down, shrunk to the smallest that fails.

`strategy` draws cases, `servers` runs them in workers that stay up, `search` looks for failures and lets
hypothesis shrink each, `regression` saves one as a probe file, `hunting` ties all together. Torch-free;
hypothesis is imported in `strategy` and `search` alone, which only a hunt imports.
"""
