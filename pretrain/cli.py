"""What every command line here does with the user's mistakes: one paragraph on stderr, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pretrain.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Call `main` and exit: 0 when it returns, 2 on a `UserError`, 130 on Ctrl-C; other exceptions keep their traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
