"""The alternatives to one token with their probabilities under every model, and how guidance changed their ranks."""

import math
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import DataTable, Static

from llmdoctor.records import Alternative, GuidedToken
from llmdoctor.show.formats import percent
from llmdoctor.show.text import quoted


class Alternatives(DataTable[Text]):
    """The table of alternatives. Left and right move the token cursor, not the table's."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "screen.token(-1)", "Token", show=False, id="alternatives.previous"),
        Binding("right", "screen.token(1)", "Token", show=False, id="alternatives.next"),
    ]


class Inspector(Vertical):
    """One token: its numbers, and its alternatives in a table; Enter on one of them forces it."""

    class Forced(Message):
        """Say this alternative instead."""

        def __init__(self, alternative: Alternative) -> None:
            super().__init__()
            self.alternative = alternative

    def __init__(self, *, can_force: bool = True, id: str | None = None) -> None:
        super().__init__(id=id)
        self.border_title = "token"
        self.border_subtitle = "Enter: say this one instead" if can_force else ""
        self.token: GuidedToken | None = None

    def compose(self) -> ComposeResult:
        """Numbers above, table below."""
        yield Static(id="token-facts")
        yield Alternatives(id="alternatives", cursor_type="row", zebra_stripes=False)

    def show(self, token: GuidedToken | None, before: GuidedToken | None, count: int, *, forced: bool = False) -> None:
        """Describe ``token``, which follows ``before`` in an answer of ``count`` tokens."""
        self.token = token
        table = self.query_one(Alternatives)
        table.clear(columns=True)
        facts = self.query_one("#token-facts", Static)
        if token is None:
            facts.update(Text("Choose a token with the arrows or the mouse.", style="dim"))
            return
        facts.update(self._facts(token, before, count, forced))
        names = list(token.doctor_logprobs)
        guided = ["guided"] if names else []  # the patient alone has nothing beside itself
        for label in ("", "token", *guided, "patient", *names, *(["rank"] if names else [])):
            table.add_column(Text(label), key=label or "mark")
        for alternative, was, now in ranked(token):
            row = [percent(alternative.logprob)] if names else []
            row += [percent(alternative.patient_logprob)]
            row += [percent(alternative.doctor_logprobs.get(name, -math.inf)) for name in names]
            said = alternative.id == token.id
            cells = [Text("●" if said else " "), Text(quoted(alternative.text), style="bold" if said else "")]
            rank = [moved(was, now)] if names else []
            table.add_row(*cells, *(Text(cell, justify="right") for cell in row), *rank)

    def _facts(self, token: GuidedToken, before: GuidedToken | None, count: int, forced: bool) -> Text:
        text = Text.assemble((quoted(token.text), "bold"), f"  {token.position + 1} of {count}")
        if forced:
            text.append("  forced", "bold")
        if token.flip:
            text.append("  flip: guidance changed the likeliest token")
        for name, value in token.values.items():
            text.append(f"\nlog V of {name} {value:+.2f}")
            if before is not None and name in before.values:
                text.append(f" ({value - before.values[name]:+.2f})", "dim")
            text.append(f", log {name}/patient {token.doctor_logprobs[name] - token.patient_logprob:+.2f}")
        betas = "".join(f", {name} {beta:g}" for name, beta in token.betas.items())
        return text.append(f"\nKL {token.kl:.2f} nats, at alpha {token.alpha:g}{betas}", "dim")

    def focus_table(self) -> None:
        """To the alternatives."""
        self.query_one(Alternatives).focus()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Enter or a second click."""
        event.stop()
        if self.token is not None and event.cursor_row < len(rows := ranked(self.token)):
            self.post_message(self.Forced(rows[event.cursor_row][0]))


def ranked(token: GuidedToken) -> Sequence[tuple[Alternative, int, int]]:
    """The alternatives and the token itself, by the product, each with its place for the patient and for the product.

    Places count among these alternatives.
    """
    others = list(token.top)
    if token.id not in {other.id for other in others}:
        own = Alternative(token.id, token.text, token.patient_logprob, token.doctor_logprobs, token.logprob)
        others.append(own)
    others.sort(key=lambda other: -other.logprob)
    by_patient = sorted(others, key=lambda other: -other.patient_logprob)
    was = {other.id: place for place, other in enumerate(by_patient, start=1)}
    return [(other, was[other.id], place) for place, other in enumerate(others, start=1)]


def moved(was: int, now: int) -> Text:
    """``3→1 ▲2``: from the patient's place to the product's."""
    arrow = f" ▲{was - now}" if now < was else f" ▼{now - was}" if now > was else ""
    return Text(f"{was}→{now}{arrow}")
