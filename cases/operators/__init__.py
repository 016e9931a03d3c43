"""The contracts, one file an operator, each ending in `OPERATOR`."""
