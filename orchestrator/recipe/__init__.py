"""The recipe: its keys, how it is read, and those that come with the package."""
