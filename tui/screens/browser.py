"""A browser of pairs of texts with a list on the left: what the rewards and the comparisons browser share."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from llmdoctor.errors import LLMDoctorError
from llmdoctor.show.text import clean
from llmdoctor.tui.widgets.hints import Hint, Hints
from llmdoctor.tui.widgets.search import SEARCH, SEARCHING, Search
from llmdoctor.tui.widgets.status import StatusLine
from llmdoctor.tui.widgets.token_view import Piece, TokenView

if TYPE_CHECKING:
    from llmdoctor.tui.app import DoctorApp

_FRAME = 1 / 15  # seconds
_NARROW = 100  # columns below which the list is above the texts

Place = Literal["left", "right"]
PLACES: tuple[Place, Place] = ("left", "right")


class Stopped(Exception):
    """The browser was left: raised inside a source to end its thread."""


@dataclass(frozen=True)
class Item:
    """One entry of the list: two texts with their headings, and a line or two about them."""

    title: str
    sides: tuple[tuple[str, Sequence[Piece]], ...]
    facts: str

    @cached_property
    def words(self) -> str:
        """All that a search looks through, casefolded."""
        texts = ("".join(piece.text for piece in shown) for _, shown in self.sides)
        return "\n".join((self.title, self.facts, *texts)).casefold()


Post = Callable[[Item | str], None]
Source = Callable[[Post, Callable[[], None]], None]


class BrowserScreen(Screen[None]):
    """Shows what ``source`` posts from a thread of its own: items for the list, or lines about progress.

    ``source`` gets a second function, which it must call often and which raises Stopped once the screen is left.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Back to the list"),
        Binding("q", "app.quit", "Leave"),
        Binding("n", "next(1)", "Next"),
        Binding("p", "next(-1)", "Previous"),
        SEARCH,
        Binding("tab", "other", "Other text", show=False),
    ]
    app: "DoctorApp"  # type: ignore[assignment]
    heading, entry = "", ""  # of the list, and what one of its entries is

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.items: list[Item] = []
        self.current: int | None = None  # in ``items``
        self._listed: list[int] = []  # those in ``items`` that the search finds, in the order of the list
        self._source = source
        self._said: deque[Item | str | LLMDoctorError | None] = deque()  # None: the source has ended
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmdoctor-browser", daemon=True)
        self._doing = "reading ..."

    # What a browser adds

    def score(self, payload: Any) -> float | None:
        """What colours a token."""
        raise NotImplementedError

    def legend(self) -> Text:
        """What the colours mean."""
        raise NotImplementedError

    def describe(self, payload: Any) -> Text | None:
        """A token's numbers in a line; None leaves the item's facts there."""
        del payload
        return None

    def more(self) -> Iterable[Any]:
        """Further widgets beside the texts."""
        return ()

    def hints(self) -> Sequence[Hint]:
        """The keys that do something now."""
        pairs, leave = ("n p", f"next, previous {self.entry}", ""), ("q", "leave", "app.quit")
        match self.focused:
            case Search():
                return SEARCHING
            case OptionList():
                return [("↑↓", "choose", ""), ("Enter", "its tokens", ""), ("/", "search", "screen.search"),
                        *self.more_hints(), leave]  # fmt: skip
        back = ("Esc", "back to the list", "screen.leave")
        return [("←→↑↓", "token", ""), ("Tab", "other text", "screen.other"), back, pairs, *self.more_hints(), leave]

    def more_hints(self) -> Sequence[Hint]:
        """Those that a browser adds."""
        return ()

    # Layout

    def compose(self) -> ComposeResult:
        """Field, list, two texts, facts, legend (where messages stand too)."""
        yield Search(id="search")
        with Horizontal(id="panes"):
            yield OptionList(id="browser-list", compact=True)
            for place in PLACES:
                with Vertical(id=place, classes="pane"):
                    yield TokenView(id=f"{place}-view", score=self.score)
            yield from self.more()
        yield Static(id="facts")
        yield StatusLine(id="status")
        yield Hints()

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

    def on_resize(self) -> None:
        """List above the texts where it is narrow."""
        self.set_class(self.narrow, "narrow")

    @property
    def narrow(self) -> bool:
        """Whether there is no room for list and texts beside each other."""
        return self.app.size.width < _NARROW

    @property
    def dark(self) -> bool:
        """Whether the theme is a dark one."""
        return self.app.current_theme.dark

    def view(self, place: Place) -> TokenView:
        """One of the two texts."""
        return self.query_one(f"#{place}-view", TokenView)

    @property
    def views(self) -> tuple[TokenView, TokenView]:
        """The two texts."""
        return self.view("left"), self.view("right")

    # The source's thread

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
        """Take what the thread has posted, for at most half a frame, so that keys are answered in between."""
        count = len(self.items)
        until = time.monotonic() + _FRAME / 2
        with suppress(IndexError):
            while time.monotonic() < until:
                said = self._said.popleft()
                if isinstance(said, Item):
                    self.items.append(said)
                elif isinstance(said, str):
                    self._doing = said
                elif said is None:
                    self._doing = ""
                    self._timer.stop()
                elif self.items:
                    self.notify(str(said), severity="error", markup=False)
                else:
                    self.app.fail(said)
        added = len(self.items) > count
        if added:
            self._list(range(count, len(self.items)))
        if added or self._doing or not self._timer._active.is_set():
            self.show_facts()

    # Showing

    def _list(self, numbers: Iterable[int]) -> None:
        """Add those items that the search finds to the list."""
        found = self.query_one(Search).found(numbers, lambda number: self.items[number].words)
        titles = [clean(self.items[number].title).replace("\n", " ") for number in found]
        self._listed += found
        options = self.query_one(OptionList)
        options.add_options([Option(Text(title, no_wrap=True, overflow="ellipsis")) for title in titles])
        if options.highlighted is None and found:
            options.highlighted = 0

    @on(Search.Sought)
    def _sought(self) -> None:
        self.query_one(OptionList).clear_options()
        self._listed.clear()
        self._list(range(len(self.items)))
        if self.current in self._listed:
            self.query_one(OptionList).highlighted = self._listed.index(self.current)
        self.show_facts()

    @on(Search.Done)
    def _found(self) -> None:
        self.query_one(OptionList).focus()

    @on(OptionList.OptionHighlighted)
    def _highlighted(self, event: OptionList.OptionHighlighted) -> None:
        if event.option_index < len(self._listed):  # else the list has changed since
            self.show(self._listed[event.option_index])

    @on(OptionList.OptionSelected)
    def _selected_option(self) -> None:
        self.view("left").focus()
        self.view("left").action_edge(0)

    @on(TokenView.Selected)
    def _selected_token(self, event: TokenView.Selected) -> None:
        self.show_facts(event.payload)

    def show(self, index: int) -> None:
        """The item with this number."""
        self.current = index
        for place, (heading, shown) in zip(PLACES, self.items[index].sides, strict=True):
            self.query_one(f"#{place}").border_title = Text(clean(heading))  # type: ignore[assignment]
            view = self.view(place)
            view.clear()
            view.following = False  # one reads from the beginning
            view.append(shown)
            view.scroll_home(animate=False, immediate=True)
        # One scale for both. A side without a score does not count: its limit is the 1 that an empty text has.
        limit = max(view.limit if self._scored(view) else 0.0 for view in self.views) or 1.0
        for view in self.views:
            view.limit = limit
        self.show_facts()

    def _scored(self, view: TokenView) -> bool:
        """Whether any token of that text has a score."""
        return any(piece.payload is not None and self.score(piece.payload) for piece in view.pieces)

    def show_facts(self, payload: Any = None) -> None:
        """About the token under the cursor, else about the item."""
        text = self.describe(payload) if payload is not None else None
        if text is None:
            count = f"{self.current + 1} of {len(self.items)}" if self.current is not None else "nothing yet"
            if len(self._listed) != len(self.items):
                count += f" ({len(self._listed)} found)"
            text = Text(count)
            if self.current is not None and self.items[self.current].facts:
                text.append(f"   {self.items[self.current].facts}")
            if self._doing:
                text.append(f"   {self._doing}", "dim")
        self.query_one("#facts", Static).update(text)
        self.query_one(StatusLine).show(self.legend())

    # Keys

    def action_leave(self) -> None:
        """From a text to the list."""
        for view in self.views:
            view.select(None)
        self.query_one(OptionList).focus()
        self.show_facts()

    def action_next(self, step: int) -> None:
        """The next item, or the previous one, from anywhere."""
        if self._listed:
            options = self.query_one(OptionList)
            options.highlighted = ((options.highlighted or 0) + step) % len(self._listed)

    def action_search(self) -> None:
        """To the field."""
        self.set_focus(self.query_one(Search))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """A slash in the field is one."""
        del parameters
        return action != "search" or not isinstance(self.focused, Search)

    def action_other(self) -> None:
        """From the list to the left text, to the right one, and back."""
        order = [self.query_one(OptionList), *self.views]
        at = next((i for i, widget in enumerate(order) if widget is self.focused), 0)
        order[(at + 1) % 3].focus()
