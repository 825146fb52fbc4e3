"""What can be wrong with one case or one data set."""

__all__: list[str] = []
