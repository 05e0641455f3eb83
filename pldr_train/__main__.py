"""`python -m pldr_train`: the command line without its script."""

import sys

from pldr_train.cli import main

sys.exit(main())
