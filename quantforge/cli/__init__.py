"""The command line."""


def main() -> None:
    """Entry point of the `quantforge` command."""
    raise SystemExit(2)
