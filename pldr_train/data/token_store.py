"""Stand-in until the real one lands."""


class TokenStore:  # noqa: D101
    pass
