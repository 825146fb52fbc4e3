"""What remains of a run for people and programs: the manifest, pictures of the masks, one page to read.

Import the module that is needed (`medseg.report.manifest`, `medseg.report.overlay`): the manifest must stay readable
without loading what the pictures need.
"""

__all__: list[str] = []
