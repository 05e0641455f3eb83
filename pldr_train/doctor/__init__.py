"""Is this machine ready for a run? Checks that say what is wrong, and what to do about it; they import no training."""
