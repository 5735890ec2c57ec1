"""`hybridzoo …` and `python -m hybridzoo …`: the door to the command line, which the [train] extra brings."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: words after the program's name; default: those of this process.

    Returns:
        0 when the verb did its work, 2 on bad input or where a package is missing, 130 when interrupted.
    """
    try:
        from hybridzoo.train.cli import run
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich"):
            raise
        print(f'error: the command line needs {missing.name}; type: pip install "hybridzoo[train]"', file=sys.stderr)
        return 2
    return run(sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
