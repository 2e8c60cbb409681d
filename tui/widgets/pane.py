"""One side of the conversation in a frame: heading, text, and for the guided side the curve of a doctor's value."""

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical

from llmdoctor.records import Speaker
from llmdoctor.show.text import clean
from llmdoctor.tui.widgets.curve import Curve
from llmdoctor.tui.widgets.token_view import Score, TokenView


class Pane(Vertical):
    """The text has the id ``patient-view`` or ``guided-view``. ``score`` colours the guided tokens."""

    def __init__(self, which: Speaker, score: Score) -> None:
        super().__init__(id=which, classes="pane")
        self.which = which
        self._score = score
        self._title = self._facts = ""

    def compose(self) -> ComposeResult:
        """The text; the patient alone has no doctor to judge it, so neither colours nor a curve."""
        if self.which == "patient":
            yield TokenView(id="patient-view")
        else:
            yield TokenView(id="guided-view", score=self._score, changed=lambda said: said.changed)
            yield Curve(id="curve")

    @property
    def view(self) -> TokenView:
        """The text."""
        return self.query_one(TokenView)

    def show_title(self, title: str) -> None:
        """Above the text."""
        if title != self._title:
            self._title = title
            self.border_title = Text(clean(title))  # type: ignore[assignment]  # in a str Textual reads markup

    def show_facts(self, facts: str) -> None:
        """Below the text."""
        if facts != self._facts:  # setting a subtitle draws all that is in the frame again
            self._facts = facts
            self.border_subtitle = Text(clean(facts))  # type: ignore[assignment]
