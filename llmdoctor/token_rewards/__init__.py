"""Stage 1: preference pairs to token rewards, drawn from the frozen patient itself."""
