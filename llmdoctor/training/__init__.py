"""Stage 2: token rewards to a doctor, with token-level flow-guided preference optimisation (TFPO)."""
