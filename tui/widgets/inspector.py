"""The alternatives to one token with their probabilities under every model, and how guidance changed their ranks."""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import DataTable, Static

from llmdoctor.records import Alternative, GuidedToken
from llmdoctor.show.formats import percent
from llmdoctor.show.text import clean, quoted

_RARE = math.log(0.001)  # what neither the patient nor the product would say more often is folded
_WIDEST = 26  # cells of a token in the table


class Alternatives(DataTable[Text]):
    """The table of alternatives. Left and right move the token cursor, not the table's."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "screen.token(-1)", "Token before", show=False, id="alternatives.previous"),
        Binding("right", "screen.token(1)", "Token after", show=False, id="alternatives.next"),
        Binding(
            "full_stop",
            "screen.change(1)",
            "Next token that guidance changed",
            show=False,
            id="alternatives.next_change",
        ),
        Binding(
            "comma",
            "screen.change(-1)",
            "Previous token that guidance changed",
            show=False,
            id="alternatives.previous_change",
        ),
    ]


class Inspector(Vertical):
    """One token: its numbers, and its alternatives in a table; Enter on one of them forces it.

    Rare alternatives are folded into a last row; Enter on it unfolds them, and folds them again.
    """

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
        self._before: GuidedToken | None = None
        self._count, self._forced = 0, False
        self._names: Mapping[int, str] = {}
        self._rows: list[Alternative] = []
        self._unfolded = False

    def compose(self) -> ComposeResult:
        """Numbers above, table below."""
        yield Static(id="token-facts")
        yield Alternatives(id="alternatives", cursor_type="row", zebra_stripes=False)

    def show_none(self) -> None:
        """There is no token to describe."""
        self.token, self._rows = None, []
        self.query_one(Alternatives).clear(columns=True)
        self.query_one("#token-facts", Static).update(Text("Choose a token with the arrows or the mouse.", "dim"))

    def show(
        self,
        token: GuidedToken,
        before: GuidedToken | None,
        count: int,
        names: Mapping[int, str],
        *,
        forced: bool = False,
    ) -> None:
        """Describe ``token``, which follows ``before`` in an answer of ``count`` tokens.

        ``names`` are those of the tokens without text, by id.
        """
        self.token, self._before, self._names, self._forced = token, before, names, forced
        self.recount(count)
        self._fill()

    def recount(self, count: int) -> None:
        """The answer of the token that is shown has ``count`` tokens now."""
        self._count = count
        if self.token is not None:
            self.query_one("#token-facts", Static).update(self._facts(self.token))

    def _fill(self) -> None:
        """The table."""
        table, token = self.query_one(Alternatives), self.token
        table.clear(columns=True)
        if token is None:
            return
        every = ranked(token)
        folded = [other for other in every if _rare(other, token)]
        self._rows = [other for other in every if self._unfolded or other not in folded]
        rows = [self._row(other, token) for other in self._rows]
        if folded:
            what = "fold those below 0.1%" if self._unfolded else f"{len(folded)} more below 0.1%"
            rows.append([Text(" "), Text(what, style="dim")])
        names = list(token.doctor_logprobs)
        labels = ["", "token", *(["guided"] if names else []), "patient", *names, *(["rank"] if names else [])]
        for label, *cells in zip_longest(map(Text, labels), *rows, fillvalue=Text()):
            # a width of our own: the table measures later, and may draw before, as wide as older rows were
            table.add_column(label, key=label.plain or "mark", width=max(cell.cell_len for cell in (label, *cells)))
        for row in rows:
            table.add_row(*row)

    def _row(self, other: Alternative, token: GuidedToken) -> list[Text]:
        """The cells of one alternative; the patient alone has no guided one beside itself."""
        names = list(token.doctor_logprobs)
        said = other.id == token.id
        cells = [Text("●" if said else " "), Text(self._named(other), style="bold" if said else "")]
        for cell in cells:
            cell.truncate(_WIDEST, overflow="ellipsis")
        shares = [other.logprob] if names else []
        shares += [other.patient_logprob, *(other.doctor_logprobs.get(name, -math.inf) for name in names)]
        rank = [moved(other.patient_rank, other.rank)] if names else []
        return [*cells, *(Text(percent(share), justify="right") for share in shares), *rank]

    def _named(self, token: GuidedToken | Alternative) -> str:
        """Its text, or what it is if it has none."""
        return quoted(token.text) if token.text else clean(self._names.get(token.id, "")) or quoted("")

    def _facts(self, token: GuidedToken) -> Text:
        before = self._before
        text = Text.assemble((self._named(token), "bold"), f"  {token.position + 1} of {self._count}")
        if self._forced:
            text.append("  forced", "bold")
        if token.flip:
            text.append("  flip: guidance changed the likeliest token")
        for name, value in token.values.items():
            text.append(f"\nlog V of {name} {value:+.2f}")
            if before is not None and name in before.values:
                text.append(f" ({value - before.values[name]:+.2f})", "dim")
            text.append(f", log {name}/patient {token.doctor_logprobs[name] - token.patient_logprob:+.2f}")
        betas = "".join(f", {name} {beta:g}" for name, beta in token.betas.items())
        # its row may be out of view
        share = f"guided {percent(token.logprob)}, patient {percent(token.patient_logprob)}; " if token.values else ""
        return text.append(f"\n{share}KL {token.kl:.2f} at alpha {token.alpha:g}{betas}", "dim")

    def focus_table(self) -> None:
        """To the alternatives."""
        self.query_one(Alternatives).focus()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Enter or a second click."""
        event.stop()
        if event.cursor_row < len(self._rows):
            self.post_message(self.Forced(self._rows[event.cursor_row]))
        elif self.token is not None:
            self._unfolded = not self._unfolded
            self._fill()
            self.query_one(Alternatives).move_cursor(row=event.cursor_row)


def ranked(token: GuidedToken) -> Sequence[Alternative]:
    """The alternatives and the token itself, by the product."""
    others = list(token.top)
    if token.id not in {other.id for other in others}:  # so in older records
        own = Alternative(token.id, token.text, token.patient_logprob, token.doctor_logprobs, token.logprob)
        others.append(own)
    return sorted(others, key=lambda other: -other.logprob)


def _rare(alternative: Alternative, token: GuidedToken) -> bool:
    """Whether neither the patient nor the product is likely to say it; never what was said or the patient's first."""
    if alternative.id == token.id or alternative.patient_rank == 1:
        return False
    return max(alternative.logprob, alternative.patient_logprob) < _RARE


def moved(was: int, now: int) -> Text:
    """``3→1 ▲2``: from the patient's place in the vocabulary to the product's; nothing where they are not known (0)."""
    if not was or not now:
        return Text()
    arrow = f" ▲{was - now}" if now < was else f" ▼{now - was}" if now > was else ""
    return Text(f"{was}→{now}{arrow}")
