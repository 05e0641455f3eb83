"""pldr_train: pretraining of PLDR-LLMs and the study of their DAG loss.

Importing the package registers PLDR-LLM with transformers' Auto classes, so that `AutoModelForCausalLM`,
`AutoTokenizer` and `pipeline` load it.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

# torch and transformers take seconds to import. The command line leaves that to the commands that need the model:
# neither --help nor a mistake in a recipe should cost it.
if Path(sys.argv[0] if sys.argv else "").name != "pldr-train":
    import pldr_train.model  # noqa: F401
