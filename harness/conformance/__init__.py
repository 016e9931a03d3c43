"""What holds of an engine's own objects, as facts that are checked one by one: no case, no launch."""
