"""``python -m syncnorm`` and the ``syncnorm`` script."""

import sys

from syncnorm.tools.common.errors import missing_extra
from syncnorm.tools.common.launcher import is_main_rank


def main() -> int:
    """Runs the command line and returns its exit code; 2, and one line on stderr, if an extra is not installed."""
    try:
        from syncnorm.tools.cli import main as cli_main

        return cli_main()
    except ModuleNotFoundError as error:
        hint = missing_extra(error)
        if hint is None:
            raise
        if is_main_rank():
            print(f"syncnorm: {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while torch is imported; the command line handles later ones
        return 130


if __name__ == "__main__":
    sys.exit(main())
