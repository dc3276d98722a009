"""attncheck: does an attention operator really work on DTensors?"""

__version__ = "0.1.0"
HOMEPAGE = "https://github.com/attncheck/attncheck"
