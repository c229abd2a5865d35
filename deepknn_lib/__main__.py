"""`python -m deepknn_lib`."""

import os
import sys
import warnings

from deepknn_lib.cli import main

warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
status = main()
if status == 130:  # After Ctrl-C, nobody waits for Python to take torch apart.
    sys.stdout.flush()
    os._exit(status)
sys.exit(status)
