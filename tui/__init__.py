"""Home of the full-screen Textual app. Until it is built, ``llmdoctor chat`` is the plain conversation."""
