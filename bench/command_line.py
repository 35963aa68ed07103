"""The parser with which each bench's command line begins."""

import argparse


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Returns the parser of ``python -m name``, whose help is the module's docstring as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
