"""Running a bundle: training, evaluation and prediction, in one process or several."""

__all__: list[str] = []
