"""`python -m deepknn_lib`."""

import os
import sys
import warnings

warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
try:
    from deepknn_lib.cli import main

    status = main()
except KeyboardInterrupt as stopped:
    told = str(stopped) or "nothing is lost"
    print(f"\nstopped, {told}; the same command goes on from here", file=sys.stderr)
    status = 130
if status == 130:  # After Ctrl-C, nobody waits for Python to take torch apart.
    sys.stdout.flush()
    os._exit(status)
sys.exit(status)
