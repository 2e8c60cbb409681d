"""The browser of comparisons: ``llmdoctor compare --tui``."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import on
from textual.binding import Binding, BindingType
from textual.widgets import OptionList

from llmdoctor.records import Comparison
from llmdoctor.sessions import Reply
from llmdoctor.show.comparison import View
from llmdoctor.show.lens import LENSES, Lens, following, lens_limit
from llmdoctor.show.text import clean
from llmdoctor.tui import token_style
from llmdoctor.tui.conversation import ENDED, Said, ending, pieces
from llmdoctor.tui.screens.browser import BrowserScreen, Item, Source
from llmdoctor.tui.widgets.hints import Hint, Hints
from llmdoctor.tui.widgets.inspector import Inspector
from llmdoctor.tui.widgets.token_view import TokenView

_ROOM_FOR_ALL = 160  # columns needed to show list, texts and inspector side by side


class ComparisonsScreen(BrowserScreen):
    """Comparisons, the patient alone beside the guided patient, while they are made."""

    heading, entry = "prompts", "prompt"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f3", "next_lens", "Lens"),
        Binding("ctrl+l,shift+f3", "next_doctor", "Lens doctor"),
    ]

    def __init__(self, source: Source, lens: Lens, doctor: str | None, doctors: Sequence[str]) -> None:
        super().__init__(source)
        self.lens, self.doctor, self._doctors = lens, doctor or next(iter(doctors), None), list(doctors)

    def on_mount(self) -> None:
        """The scale of the colours."""
        self._recolour()

    def more(self) -> Iterable[Any]:
        """The inspector of the conversation, without forcing."""
        inspector = Inspector(can_force=False, id="inspector")
        inspector.display = False
        return (inspector,)

    def more_hints(self) -> Sequence[Hint]:
        """The colours."""
        return [("F3", f"colour: {self.lens}", "screen.next_lens")]

    def score(self, payload: Said) -> float | None:
        """The lens' score; no doctor judges the patient alone."""
        return token_style.score(payload.token, self.lens, self.doctor) if payload.token.values else None

    def legend(self) -> Text:
        """Of the lens."""
        return token_style.lens_legend(self.lens, self.doctor, dark=self.dark, narrow=self.narrow)

    @on(TokenView.Selected)
    def _inspect(self, event: TokenView.Selected) -> None:
        inspector = self.query_one(Inspector)
        inspector.display = event.payload is not None
        self.query_one(OptionList).display = event.payload is None or self.app.size.width >= _ROOM_FOR_ALL
        if event.payload is not None:
            tokens = [piece.payload.token for piece in event.view.pieces if isinstance(piece.payload, Said)]
            position = event.payload.position
            before = tokens[position - 1] if position else None
            # The models are not at hand; but what ends an answer is what this one ended with.
            ends = {piece.payload.token.id: "end of answer" for piece in event.view.pieces if piece.text == ENDED}
            inspector.show(event.payload.token, before, len(tokens), ends)

    def action_leave(self) -> None:
        """From a text to the list."""
        super().action_leave()
        self.query_one(Inspector).display = False
        self.query_one(OptionList).display = True
        self.query_one(OptionList).focus()  # again: before, it could not take the focus if it was hidden

    def action_next_lens(self) -> None:
        """The next kind of colour."""
        self.lens = following(LENSES, self.lens)
        self._recolour()

    def action_next_doctor(self) -> None:
        """The next doctor's opinion."""
        if self._doctors:
            self.doctor = following(self._doctors, self.doctor)
            self._recolour()

    def _recolour(self) -> None:
        for view in self.views:
            view.scale = lens_limit(self.lens)
            view.recolour(self.score)
        self.query_one(Hints).show(self.hints())
        self.show_facts()


def comparison_items(comparison: Comparison) -> Iterator[Item]:
    """An item for every guided answer of a finished comparison, beside that of the patient alone."""
    for view in View.of(comparison, "off").columns:
        one = view.comparison
        sides = []
        for heading, answer in (("patient alone", one.patient), (view.heading, one.guided)):
            reply = Reply(answer.tokens, "done" if answer.finished else "length")
            sides.append((heading, [*pieces(0, reply), *ending(0, reply)]))
        title = f"{clean(view.name)}: {view.prompt}" if view.name else view.prompt
        yield Item(title, tuple(sides), f"{title}\n{'; '.join(view.summary())}")
