"""The text field: Enter sends, Shift+Enter or Ctrl+J starts a new line, Up in an empty field edits the last message."""

from textual import events
from textual.message import Message
from textual.widgets import TextArea


class Prompt(TextArea):
    """A text field as high as its text, up to five lines."""

    class Submitted(Message):
        """Enter was pressed on some text. The field is already empty: keys that follow belong to the next message."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    class Recalled(Message):
        """Up was pressed in the empty field."""

    def __init__(self, placeholder: str, *, id: str | None = None) -> None:
        super().__init__(
            id=id, compact=True, show_line_numbers=False, soft_wrap=True, tab_behavior="focus",
            highlight_cursor_line=False, placeholder=placeholder,
        )  # fmt: skip
        for key in ("f6", "f7"):  # TextArea binds them to selecting text; here they are the app's
            self._bindings.key_to_bindings.pop(key, None)

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.stop()
            event.prevent_default()
            if text := self.text.strip():
                self.text = ""
                self.post_message(self.Submitted(text))
        elif event.key in ("shift+enter", "ctrl+j"):
            event.stop()
            event.prevent_default()
            self.insert("\n")
        elif event.key == "up" and not self.text:
            event.stop()
            event.prevent_default()
            self.post_message(self.Recalled())
        else:
            await super()._on_key(event)

    def put(self, text: str) -> None:
        """Show this text with the cursor at its end, and take the focus."""
        self.text = text
        self.move_cursor(self.document.end)
        self.focus()
