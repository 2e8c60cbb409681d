"""One steered model for many clients: the engine that answers them together, and the HTTP interface before it."""
