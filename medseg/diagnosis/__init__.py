"""What is wrong with a data set before training, and repaired copies of it."""

__all__: list[str] = []
