"""``python -m syncnorm`` and the ``syncnorm`` script."""

import os
import sys

# Import name -> the extra that brings it.
_EXTRAS = {"click": "compare", "rich": "compare", "sklearn": "compare"}


def main() -> int:
    """Runs the command line; says in one line which extra is missing where one is."""
    try:
        from syncnorm.cli import main as cli_main

        return cli_main()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        if os.environ.get("RANK", "0") == "0":
            extra = _EXTRAS[missing]
            print(f'syncnorm: needs {missing}: pip install "syncnorm[{extra}]"', file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
