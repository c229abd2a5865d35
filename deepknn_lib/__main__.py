"""`python -m deepknn_lib`."""

import sys

from deepknn_lib.cli import main

sys.exit(main())
