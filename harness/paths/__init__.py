"""The production paths, one folder a family, each file ending in `PATHS`."""
