"""A clock in the hands of a test."""


class Hands:
    """Time that passes only when a test says so."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds
