"""Pictures of what a run made, for people to look at. Import the module that is needed."""

__all__: list[str] = []
