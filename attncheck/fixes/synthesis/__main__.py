"""`python -m attncheck.fixes.synthesis ASKED ANSWER`: see `process`."""

from attncheck.fixes.synthesis import process

process.main()
