"""The gate: whether the cases hit what a change touches, by a policy, and what is exempt from it."""
