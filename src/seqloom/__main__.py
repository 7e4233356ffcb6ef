"""`python -m seqloom` is the command line."""

import sys

from seqloom.cli.main import main

sys.exit(main())
