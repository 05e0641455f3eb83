"""Documents as they are stored: files of the disk and of the Hub, what converts them, and the built-in corpora."""
