"""Browsers of pairs of texts, a list on the left: token rewards of a rewards folder, and comparisons."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

from llmdoctor.cli.render import Lens, RewardedText, View
from llmdoctor.cli.terminal import clean
from llmdoctor.errors import LLMDoctorError
from llmdoctor.records import Comparison
from llmdoctor.sessions import Reply
from llmdoctor.tui import lens
from llmdoctor.tui.conversation import Said, pieces
from llmdoctor.tui.widgets.inspector import Inspector, quoted
from llmdoctor.tui.widgets.token_view import Piece, TokenView

if TYPE_CHECKING:
    from llmdoctor.tui.app import DoctorApp

_FRAME = 1 / 15
_NARROW = 100


class Stopped(Exception):
    """The browser was left: raised inside a source."""


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of the list: two texts with their headings, and a line or two about them."""

    title: str
    sides: tuple[tuple[str, Sequence[Piece]], ...]
    facts: str


Post = Callable[[Item | str], None]
Source = Callable[[Post, Callable[[], None]], None]


class BrowserScreen(Screen[None]):
    """Shows what ``source`` posts, from a thread of its own: items for the list, or lines about progress.

    ``source`` gets a second function, which it must call often and which raises Stopped once the screen is left.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Back to the list"),
        Binding("q", "app.quit", "Quit"),
        Binding("n", "next(1)", "Next"),
        Binding("p", "next(-1)", "Previous"),
        Binding("tab", "other", "Other text", show=False),
    ]
    app: "DoctorApp"  # type: ignore[assignment]
    heading = ""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.items: list[Item] = []
        self.current: int | None = None
        self._source = source
        self._said: deque[Item | str | LLMDoctorError | None] = deque()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmdoctor-browser", daemon=True)
        self._doing = "reading ..."

    def compose(self) -> ComposeResult:
        """List, two texts, facts, legend."""
        with Horizontal(id="panes"):
            yield OptionList(id="browser-list", compact=True)
            for name in ("left", "right"):
                with Vertical(id=name, classes="pane"):
                    yield TokenView(id=f"{name}-view", score=self.score)
            yield from self.more()
        yield Static(id="facts")
        yield Static(id="legend")
        yield Footer(compact=True)

    def more(self) -> Iterable[Any]:
        """Further widgets beside the texts."""
        return ()

    def on_mount(self) -> None:
        """Begin to read."""
        self.query_one(OptionList).border_title = self.heading
        self.query_one(OptionList).focus()
        self._timer = self.set_interval(_FRAME, self.drain)
        self._thread.start()
        self.show_facts()

    def on_unmount(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(5)

    def _run(self) -> None:
        def check() -> None:
            if self._stopped.is_set():
                raise Stopped

        try:
            self._source(self._said.append, check)
        except Stopped:
            return
        except LLMDoctorError as error:
            self._said.append(error)
        except Exception as error:  # a readable screen, not a dead thread
            self._said.append(LLMDoctorError(f"{type(error).__name__}: {error}"))
        self._said.append(None)

    def drain(self) -> None:
        """Take what the thread has posted; at most for a frame's time."""
        added: list[Option] = []
        until = time.monotonic() + _FRAME / 2
        with suppress(IndexError):
            while time.monotonic() < until:
                said = self._said.popleft()
                if isinstance(said, Item):
                    self.items.append(said)
                    added.append(Option(Text(clean(said.title).replace("\n", " "), no_wrap=True, overflow="ellipsis")))
                elif isinstance(said, str):
                    self._doing = said
                elif said is None:
                    self._doing = ""
                    self._timer.stop()
                elif self.items:
                    self.notify(str(said), severity="error", markup=False)
                else:
                    self.app.fail(said)
        if added:
            self.query_one(OptionList).add_options(added)
            if self.current is None:
                self.query_one(OptionList).highlighted = 0
        if added or self._doing or not self._timer._active.is_set():
            self.show_facts()

    @on(OptionList.OptionHighlighted)
    def _highlighted(self, event: OptionList.OptionHighlighted) -> None:
        self.show(event.option_index)

    @on(OptionList.OptionSelected)
    def _selected_option(self) -> None:
        self.view("left").focus()
        self.view("left").action_edge(0)

    def show(self, index: int) -> None:
        """The item with this number."""
        self.current = index
        for name, (heading, shown) in zip(("left", "right"), self.items[index].sides, strict=True):
            self.query_one(f"#{name}").border_title = heading
            view = self.view(name)
            view.clear()
            view.following = False
            view.append(shown)
            view.scroll_home(animate=False, immediate=True)
        limit = max(self.view(name).limit if self.scored(name) else 0.0 for name in ("left", "right")) or 1.0
        for name in ("left", "right"):  # one scale for both
            self.view(name).limit = limit
        self.show_facts()

    def scored(self, name: str) -> bool:
        """Whether any token of that side has a score."""
        return any(piece.payload is not None and self.score(piece.payload) for piece in self.view(name).pieces)

    def view(self, name: str) -> TokenView:
        """One of the two texts."""
        return self.query_one(f"#{name}-view", TokenView)

    def score(self, payload: Any) -> float | None:
        """What colours a token."""
        raise NotImplementedError

    def describe(self, payload: Any) -> Text | None:
        """A token's numbers, in a line."""
        del payload
        return None

    def legend(self) -> Text:
        """What the colours mean."""
        raise NotImplementedError

    @on(TokenView.Selected)
    def _selected_token(self, event: TokenView.Selected) -> None:
        self.show_facts(event.payload)

    def show_facts(self, payload: Any = None) -> None:
        """About the token under the cursor, else about the item."""
        text = self.describe(payload) if payload is not None else None
        if text is None:
            count = f"{self.current + 1} of {len(self.items)}" if self.current is not None else "nothing yet"
            text = Text(count)
            if self.current is not None and self.items[self.current].facts:
                text.append(f"   {self.items[self.current].facts}")
            if self._doing:
                text.append(f"   {self._doing}", "dim")
        self.query_one("#facts", Static).update(text)
        self.query_one("#legend", Static).update(self.legend())

    def action_leave(self) -> None:
        """From a text to the list."""
        for name in ("left", "right"):
            self.view(name).select(None)
        self.query_one(OptionList).focus()
        self.show_facts()

    def action_next(self, step: int) -> None:
        """The next item, from wherever one is."""
        if self.items:
            self.query_one(OptionList).highlighted = ((self.current or 0) + step) % len(self.items)

    def action_other(self) -> None:
        """From the list to the left text, to the right one, and back."""
        order = [self.query_one(OptionList), self.view("left"), self.view("right")]
        at = next((i for i, widget in enumerate(order) if widget is self.focused), 0)
        order[(at + 1) % 3].focus()

    def on_resize(self) -> None:
        """List above the texts where it is narrow."""
        self.set_class(self.app.size.width < _NARROW, "narrow")


class Rewarded(NamedTuple):
    """A token of a response, as stage 1 sees it."""

    side: str
    position: int
    text: str
    reward: float
    gap: float
    importance: float


class RewardsScreen(BrowserScreen):
    """Token rewards, chosen beside rejected."""

    heading = "pairs"

    def score(self, payload: Rewarded) -> float | None:
        """The reward."""
        return payload.reward

    def describe(self, payload: Rewarded) -> Text:
        """Reward, gap and importance."""
        p = payload
        return Text.assemble(
            (quoted(p.text), "bold"),
            f"   {p.side}, token {p.position + 1}   reward {p.reward:+.3f}   gap {p.gap:+.3f} nats   "
            f"importance {p.importance:.3f}",
        )

    def legend(self) -> Text:
        """One scale for both sides."""
        limit = self.view("left").limit if self.current is not None else 1.0
        text = lens.legend("value", None, limit, dark=self.app.current_theme.dark, narrow=self.app.size.width < _NARROW)
        return Text("token reward") + text[len("log V of no doctor") :]


def rewards_item(
    name: str, prompt: str, sides: Sequence[tuple[RewardedText, Sequence[float], Sequence[float]]]
) -> Item:
    """``sides``: what ``inspect`` shows of each response, with the gaps and importances of its tokens."""
    shown = []
    for text, gaps, importance in sides:
        side = text.title.split(",")[0]
        rows = zip(text.pieces, text.rewards, gaps, importance, strict=True)
        tokens = [
            Piece(piece or "∎", "token", Rewarded(side, i, piece, float(reward), float(gap), float(weight)))
            for i, (piece, reward, gap, weight) in enumerate(rows)
        ]
        shown.append((text.title, tokens))
    return Item(f"{name}  {prompt}", tuple(shown), prompt)


class ComparisonsScreen(BrowserScreen):
    """Comparisons, patient alone beside guided, as they are made."""

    heading = "prompts"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f3", "next_lens", "Lens"),
        Binding("ctrl+l,shift+f3", "next_doctor", "Lens doctor"),
    ]

    def __init__(self, source: Source, lens_kind: Lens, doctor: str | None, doctors: Sequence[str]) -> None:
        super().__init__(source)
        self.lens, self.doctor, self._doctors = lens_kind, doctor or next(iter(doctors), None), list(doctors)

    def more(self) -> Iterable[Any]:
        """The same inspector as in the conversation, for reading."""
        inspector = Inspector(can_force=False, id="inspector")
        inspector.display = False
        return (inspector,)

    def score(self, payload: Said) -> float | None:
        """The lens' score; the patient alone has no doctor to judge it."""
        return lens.score(payload.token, self.lens, self.doctor) if payload.token.values else None

    def legend(self) -> Text:
        """The lens'."""
        limit = self.view("right").limit if self.current is not None else 1.0
        width = self.app.size.width
        return lens.legend(self.lens, self.doctor, limit, dark=self.app.current_theme.dark, narrow=width < _NARROW)

    @on(TokenView.Selected)
    def _inspect(self, event: TokenView.Selected) -> None:
        inspector = self.query_one(Inspector)
        inspector.display = event.payload is not None
        self.query_one(OptionList).display = event.payload is None or self.app.size.width >= 160
        if event.payload is not None:
            tokens = [piece.payload.token for piece in event.view.pieces if piece.payload is not None]
            position = event.payload.position
            before = tokens[position - 1] if position else None
            inspector.show(event.payload.token, before, len(tokens))

    def action_leave(self) -> None:
        """From a text to the list."""
        super().action_leave()
        self.query_one(Inspector).display = False
        self.query_one(OptionList).display = True
        self.query_one(OptionList).focus()

    def action_next_lens(self) -> None:
        """The next kind of colour."""
        self.lens = lens.LENSES[(lens.LENSES.index(self.lens) + 1) % len(lens.LENSES)]  # type: ignore[assignment]
        self._recolour()

    def action_next_doctor(self) -> None:
        """The next doctor's opinion."""
        if self._doctors:
            at = self._doctors.index(self.doctor) if self.doctor in self._doctors else -1
            self.doctor = self._doctors[(at + 1) % len(self._doctors)]
            self._recolour()

    def _recolour(self) -> None:
        for name in ("left", "right"):
            self.view(name).recolour(self.score)
        self.show_facts()


def comparison_item(comparison: Comparison) -> Item:
    """A finished comparison."""
    view = View.of(comparison, "off")
    sides = []
    for heading, answer in (("patient alone", comparison.patient), (view.heading, comparison.guided)):
        sides.append((heading, list(pieces(0, Reply(answer.tokens)))))
    return Item(view.prompt, tuple(sides), f"{view.prompt}\n{'; '.join(view.summary())}")
