"""Running a bundle: training, evaluation and prediction, in one process or several."""
