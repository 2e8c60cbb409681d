"""A slider for one number: arrows, Shift for big steps, Home and End, a typed value, the mouse, Backspace to reset."""

from typing import ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from llmdoctor.show.text import clean


class Slider(Widget, can_focus=True):
    """``label ━━━━●──── 0.80``. A typed value may lie beyond ``high``; none lies below ``low``."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,down", "move(-1)", "Less", show=False, id="slider.less"),
        Binding("right,up", "move(1)", "More", show=False, id="slider.more"),
        Binding("shift+left,shift+down", "move(-10)", "Much less", show=False, id="slider.much_less"),
        Binding("shift+right,shift+up", "move(10)", "Much more", show=False, id="slider.much_more"),
        Binding("home", "edge(0)", "Least", show=False, id="slider.least"),
        Binding("end", "edge(1)", "Most", show=False, id="slider.most"),
        Binding("r,delete", "reset", "Reset", show=False, id="slider.reset"),
    ]
    value: reactive[float] = reactive(0.0)
    _typed: reactive[str] = reactive("")

    class Changed(Message):
        """The value was changed by keys or mouse."""

        def __init__(self, slider: "Slider", value: float) -> None:
            super().__init__()
            self.slider, self.value = slider, value

    def __init__(
        self,
        label: str,
        value: float,
        *,
        low: float = 0.0,
        high: float = 2.0,
        step: float = 0.05,
        name: str | None = None,
        id: str | None = None,
    ) -> None:
        super().__init__(name=name, id=id)
        self.label, self.low, self.high, self.step, self.default = clean(label), low, high, step, value
        self.set_reactive(Slider.value, value)
        hint = f"{label}: {low:g} to {high:g}; type a number; r or a double click resets to {value:g}"
        self.tooltip = Text(clean(hint))

    def set_value(self, value: float) -> None:
        """Set the value, at least ``low``, and post Changed."""
        value = max(self.low, round(value, 6))
        if value != self.value:
            self.value = value
            self.post_message(self.Changed(self, value))

    def action_move(self, steps: int) -> None:
        """Some steps, to a whole number of steps, at most to an end."""
        if steps > 0 and self.value >= self.high:
            return
        moved = round(self.value / self.step) * self.step + steps * self.step
        self.set_value(min(self.high, moved))

    def action_edge(self, share: int) -> None:
        """To one end."""
        self.set_value(self.high if share else self.low)

    def action_reset(self) -> None:
        """Back to the initial value."""
        self._typed = ""
        self.set_value(self.default)

    def on_key(self, event: events.Key) -> None:
        """Digits type a value; Enter takes it, Escape drops it."""
        if event.character and event.character in "0123456789.,":
            self._typed += "." if event.character == "," else event.character
        elif self._typed and event.key == "backspace":
            self._typed = self._typed[:-1]
        elif self._typed and event.key in ("enter", "escape"):
            typed, self._typed = self._typed, ""
            if event.key == "enter":
                self._take(typed)
        else:
            return
        event.stop()
        event.prevent_default()

    def _take(self, typed: str) -> None:
        try:
            self.set_value(float(typed))
        except ValueError:
            self.app.bell()

    def on_blur(self) -> None:
        """Leaving the slider takes the value that is being typed."""
        if self._typed:
            typed, self._typed = self._typed, ""
            self._take(typed)

    # Mouse

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Take hold of the knob."""
        start, width = self._track()
        if start <= event.get_content_offset_capture(self).x < start + width:
            self.capture_mouse()
            self._drag(event)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Drag it."""
        if self.app.mouse_captured is self:
            self._drag(event)

    def on_mouse_up(self) -> None:
        """Let it go."""
        self.release_mouse()

    def on_click(self, event: events.Click) -> None:
        """A double click resets."""
        if event.chain == 2:
            self.action_reset()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """The wheel."""
        event.stop()
        self.action_move(1)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """The wheel."""
        event.stop()
        self.action_move(-1)

    def _drag(self, event: events.MouseEvent) -> None:
        start, width = self._track()
        share = (event.get_content_offset_capture(self).x - start) / max(1, width - 1)
        value = self.low + min(1.0, max(0.0, share)) * (self.high - self.low)
        self.set_value(round(value / self.step) * self.step)

    # Drawing

    def _track(self) -> tuple[int, int]:
        """First cell and width of the track."""
        start = cell_len(self.label) + 1
        return start, max(1, self.content_size.width - start - len(self._shown()) - 1)

    def _shown(self) -> str:
        return (self._typed + "▏").rjust(5) if self._typed else f"{self.value:.2f}".rjust(5)

    def render(self) -> Text:
        """Label, track, value."""
        _, width = self._track()
        share = min(1.0, (self.value - self.low) / (self.high - self.low))
        knob = round(share * (width - 1))
        text = Text(no_wrap=True, overflow="crop", end="")
        text.append(f"{self.label} ", "bold" if self.has_focus else "")
        text.append("━" * knob).append("●", "bold").append("─" * (width - 1 - knob), "dim")
        return text.append(f" {self._shown()}", "bold" if self.has_focus else "")
