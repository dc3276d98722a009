"""`python -m attncheck`."""

from attncheck.cli import main

if __name__ == "__main__":
    main()
