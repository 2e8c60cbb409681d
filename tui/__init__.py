"""The full-screen Textual app: conversation, rewards browser, comparison browser. It knows no tensors."""
