"""Does a doctor work? Which answers it prefers, what guided answers are worth, and an LM for lm-evaluation-harness."""
