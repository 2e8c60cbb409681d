"""The app's only door for the command line. Textual is imported once an app is started, not before."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from llmdoctor.records import Comparison
from llmdoctor.tui.config import sessions_file
from llmdoctor.tui.guard import full_screen

if TYPE_CHECKING:
    from llmdoctor.profile import Profile
    from llmdoctor.serving.client import RemoteDoctor
    from llmdoctor.sessions import Session, SessionStore
    from llmdoctor.show.lens import Lens
    from llmdoctor.show.rewards import ShownPair

__all__ = ["Compare", "PostComparison", "browse_comparisons", "browse_rewards", "chat", "full_screen", "sessions_file"]

PostComparison = Callable[[Comparison | str], None]
Compare = Callable[[PostComparison, Callable[[], None]], None]


def chat(
    profile: "Profile",
    *,
    seed: int | None,
    session: "Session | None",
    store: "SessionStore | None",
    trust_remote_code: bool,
    remote: "RemoteDoctor | None" = None,
) -> int:
    """Hold a conversation, a new one or ``session``, which ``store`` has loaded; returns the exit code.

    With ``remote`` nothing is loaded: ``profile`` says how a server's models speak.
    """
    from llmdoctor.tui.app import ChatApp, run
    from llmdoctor.tui.start import start_of

    how = {"seed": seed, "session": session, "store": store, "remote": remote}
    start = start_of(profile, trust_remote_code=trust_remote_code, **how)  # type: ignore[arg-type]
    return run(ChatApp(start))


def browse_rewards(pairs: "Iterable[ShownPair]") -> int:
    """Show the pairs, which are taken in a thread of the app's, one by one; returns the exit code."""
    from llmdoctor.tui.app import BrowserApp, run
    from llmdoctor.tui.screens.browser import Post
    from llmdoctor.tui.screens.rewards_browser import RewardsScreen, rewards_item

    def source(post: Post, check: Callable[[], None]) -> None:
        for pair in pairs:
            check()
            post(rewards_item(pair.name, pair.prompt, [(side, side.gaps, side.importance) for side in pair.sides]))

    return run(BrowserApp(lambda: RewardsScreen(source)))


def browse_comparisons(compare: Compare, *, lens: "Lens", doctor: str | None, doctors: Sequence[str]) -> int:
    """Show what ``compare`` posts from a thread of the app's: comparisons, or lines about progress.

    ``compare`` gets a second function, to be called often: it ends the thread once the browser is left. Returns the
    exit code.
    """
    from llmdoctor.tui.app import BrowserApp, run
    from llmdoctor.tui.screens.browser import Post
    from llmdoctor.tui.screens.comparisons_browser import ComparisonsScreen, comparison_items

    def source(post: Post, check: Callable[[], None]) -> None:
        def post_all(said: Comparison | str) -> None:
            for item in (said,) if isinstance(said, str) else comparison_items(said):
                post(item)

        compare(post_all, check)

    return run(BrowserApp(lambda: ComparisonsScreen(source, lens, doctor, doctors)))
