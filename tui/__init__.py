"""The full-screen Textual app: conversation, rewards browser, comparison browser. It consumes records, never tensors."""
