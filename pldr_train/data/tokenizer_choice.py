"""Stand-in until the real one lands."""
from pathlib import Path

from pldr_train.data.tokenizer_training import quickstart_tokenizer


def recipe_tokenizer(settings, source, train, say=print):
    if settings.tokenizer: return Path(settings.tokenizer)
    return quickstart_tokenizer(settings.cache_dir, settings.vocab_size, train)
