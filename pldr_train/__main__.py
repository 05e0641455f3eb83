"""`python -m pldr_train`: the command line without its script."""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]  # or a torch.py in the working directory would be run instead of PyTorch

from pldr_train.cli import main

sys.exit(main())
