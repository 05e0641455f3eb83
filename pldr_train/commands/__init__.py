"""The commands of `pldr-train` that work on trained models; each module has `build_parser` and `run`."""
