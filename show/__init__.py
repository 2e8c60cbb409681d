"""What the command line and the full-screen app both use to show records. Uses rich, never Typer, Textual or torch."""
