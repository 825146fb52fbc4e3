"""The file formats of images and labels: one module each, with `read`, `read_grid` and `write`."""
