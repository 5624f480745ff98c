"""What stands for a kill inside a test."""


class KilledError(BaseException):
    """Not an error of the run's own, which would become a row."""
