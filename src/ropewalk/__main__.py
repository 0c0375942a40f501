"""`python -m ropewalk` is the `ropewalk` command."""

from .cli.main import main

if __name__ == "__main__":
    main()
