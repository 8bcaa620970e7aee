"""`python -m quantforge` is the command line."""

from quantforge.cli import main

if __name__ == "__main__":
    main()
