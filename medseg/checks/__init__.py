"""What can be wrong with one case or one data set."""
