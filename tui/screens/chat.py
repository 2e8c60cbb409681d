"""What the keys, the prompt and the sliders do in a conversation."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from textual import on
from textual.binding import Binding, BindingType

from llmdoctor.errors import LLMDoctorError
from llmdoctor.tui import commands
from llmdoctor.tui.debounce import Debounce
from llmdoctor.tui.screens.conversation_screen import ConversationScreen
from llmdoctor.tui.widgets.hints import Hint
from llmdoctor.tui.widgets.inspector import Alternatives, Inspector
from llmdoctor.tui.widgets.prompt import Prompt
from llmdoctor.tui.widgets.slider import Slider
from llmdoctor.tui.widgets.sliders import Sliders
from llmdoctor.tui.widgets.token_view import TokenView
from llmdoctor.tui.widgets.welcome import Examples, Welcome


class ChatScreen(ConversationScreen):
    """A conversation to take part in."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop the answer; close what is open", id="chat.stop"),
        Binding("f1", "help", "This help", priority=True, id="chat.help"),
        Binding("f2", "inspect", "The tokens: open the inspector, or close it", priority=True, id="chat.inspect"),
        Binding("f3", "next_lens", "Colour by the next lens", priority=True, id="chat.lens"),
        Binding(
            "shift+f3,ctrl+l", "next_doctor", "Colour by the next doctor", show=False, priority=True, id="chat.doctor"
        ),
        Binding("f4", "sliders", "To the sliders and back", priority=True, id="chat.sliders"),
        Binding("f5", "rerun", "Answer again, same seed, with the settings in use", priority=True, id="chat.rerun"),
        Binding("f6", "regenerate", "Answer again with another seed", priority=True, id="chat.regenerate"),
        Binding("f7", "edit", "Edit the last message", priority=True, id="chat.edit"),
        Binding("f8", "copy", "Copy the answer", priority=True, id="chat.copy"),
        Binding("f9", "sessions", "Saved conversations", priority=True, id="chat.sessions"),
        Binding("ctrl+t", "other_pane", "To the other side", show=False, priority=True, id="chat.other_pane"),
        Binding(
            "alt+left,ctrl+b",
            "back",
            "Undo: before the last forced token, re-run or message",
            show=False,
            priority=True,
            id="chat.back",
        ),
        Binding("alt+right,ctrl+n", "forward", "Redo", show=False, priority=True, id="chat.forward"),
        Binding(
            "enter", "alternatives", "From a text to the table of alternatives", show=False, id="chat.alternatives"
        ),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.rerun = Debounce(self, self._rerun)

    # Asking, and asking again

    @on(Prompt.Submitted)
    def _submitted(self, event: Prompt.Submitted) -> None:
        examples = self.app.start.welcome.examples
        if event.text.startswith("/"):
            self.obey(event.text)
        elif not self.turns and event.text.isdecimal() and 0 < int(event.text) <= len(examples):
            self.send(examples[int(event.text) - 1])
        else:
            self.send(event.text)

    @on(Welcome.Asked)
    def _example(self, event: Welcome.Asked) -> None:
        self.set_focus(self.prompt)
        self.send(event.question)

    def action_focus_prompt(self) -> None:
        """To the text field, at once: more may be typed already."""
        self.set_focus(self.prompt)

    def send(self, text: str) -> None:
        """Ask; while editing, instead of the last question."""
        if self.live:
            self.notify("Still answering: Esc stops.", severity="warning")
            self.prompt.put(text if not self.prompt.text else f"{text}\n{self.prompt.text}")
            return
        instead, self.editing = self.editing, False
        self.answering.ask(text, instead=instead)

    def action_rerun(self) -> None:
        """The last answer again, same seed; while a slider moves, once it rests."""
        if self.turns:
            self.rerun.ask()
        else:
            self.notify("There is no answer to re-run yet.")

    def _rerun(self) -> None:
        if self.turns:  # a new conversation may have been opened while this waited
            self.answering.again()

    def action_regenerate(self) -> None:
        """The last answer again with another seed."""
        if self.turns:
            self.answering.other()
        else:
            self.notify("There is no answer to make again yet.")

    @on(Inspector.Forced)
    def _forced(self, event: Inspector.Forced) -> None:
        selected = self.panes.selected
        if selected is not None:
            which, said = selected
            self.answering.force(which, said.turn, said.position, event.alternative.id)
            self.view(which).focus()

    @on(Prompt.Recalled)
    def _recalled(self) -> None:
        if self.turns:
            self.action_edit()
        elif examples := self.query(Examples):
            examples.first().focus()

    def action_edit(self) -> None:
        """Put the last message into the prompt; sending it replaces it."""
        if not self.turns:
            self.notify("There is no message to edit yet.")
            return
        self.answering.stop()
        self.editing = True
        self.prompt.put(self.turns[-1].prompt)
        self.show_status()

    def action_back(self) -> None:
        """To the conversation before the last forced token, re-run or message."""
        self._step(-1)

    def action_forward(self) -> None:
        """Undo ``back``."""
        self._step(1)

    def _step(self, direction: Literal[-1, 1]) -> None:
        self.answering.stop()
        if not self.history.step(direction):
            self.notify("There is nothing to step to.")
            return
        self.answering.doing = ""
        self.save()
        self.show_all()

    # Keys

    def action_stop(self) -> None:
        """Escape: stop an answer; without one, leave the edited message, the table, or the inspector."""
        if self.live:
            self.answering.stop()
        elif self.editing:
            self.editing = False
            self.prompt.text = ""
            self.show_status()
        elif isinstance(self.focused, Alternatives):
            self.view(self.panes.inspected or "guided").focus()
        elif self.panes.inspecting:
            self._close_inspector()
        else:
            self.action_focus_prompt()

    def action_inspect(self) -> None:
        """Open the inspector, or go to it; from within close it."""
        if self.panes.inspecting and self.focused is not self.prompt:
            self._close_inspector()
        else:
            self.panes.inspect()

    def _close_inspector(self) -> None:
        self.peeking = False
        self.panes.close_inspector()
        self.action_focus_prompt()

    def action_alternatives(self) -> None:
        """From the text to the table."""
        self.panes.to_table()

    def action_token(self, direction: int) -> None:
        """To the token before or after, from within the table."""
        self.panes.step(direction)

    def action_change(self, direction: int) -> None:
        """To the changed token before or after, from within the table."""
        self.panes.step_change(direction)

    def action_other_pane(self) -> None:
        """To the text of the other side."""
        self.panes.other_pane()

    def action_sliders(self) -> None:
        """To the first slider; from a slider back to the prompt."""
        if isinstance(self.focused, Slider):
            self.action_focus_prompt()
        elif self.has_class("tight"):
            self.notify("The sliders need a higher window; /set changes the same.")
        else:
            self.query(Slider).first().focus()

    def action_next_lens(self) -> None:
        """The next kind of colour."""
        self.obey("/lens")

    def action_next_doctor(self) -> None:
        """The next doctor's opinion."""
        self.obey("/doctor")

    def action_copy(self) -> None:
        """The answer that is looked at, to the clipboard."""
        which = self.panes.shown
        text = self.answering.last_text(which)
        if not text:
            self.notify("There is no answer to copy yet.")
            return
        self.app.copy_to_clipboard(text)
        self.notify(f"Copied the {'guided' if which == 'guided' else 'patient’s own'} answer.")

    def action_help(self) -> None:
        """Keys, commands, marks."""
        from llmdoctor.tui.screens.help import HelpScreen

        self.app.push_screen(HelpScreen())

    def action_sessions(self) -> None:
        """The saved conversations."""
        from llmdoctor.tui.screens.sessions import SessionsScreen

        def picked(session_id: str | None) -> None:
            if session_id:
                self.obey(f"/resume {session_id}")

        self.app.push_screen(SessionsScreen(self.session.id), picked)

    # Commands

    def obey(self, line: str) -> None:
        """Run a slash command; what is wrong with it is one line, in place of what there was to say before."""
        self.app.clear_notifications()
        try:
            commands.run(self, line)
        except LLMDoctorError as error:
            self.notify(str(error), severity="error", markup=False)

    def leave_columns(self, command: str | None) -> None:
        """A comparison was left, maybe for a command."""
        self.show_status()
        if command:
            self.obey(command)

    def begin_command(self, name: str) -> None:
        """Put a command that needs arguments into the prompt."""
        self.prompt.put(f"/{name} ")

    def hints(self) -> Sequence[Hint]:
        """What the focus, and whether an answer runs or is there, make useful."""
        key = self.app.key
        common = [(key("chat.help"), "help", "screen.help")]
        stop = [(key("chat.stop"), "stop", "screen.stop")] if self.live else []
        lens = (key("chat.lens"), f"colour: {self.lens}", "screen.next_lens")
        rerun = (key("chat.rerun"), "apply the sliders" if self.stale else "again", "screen.rerun")
        sliders = (key("chat.sliders"), "sliders", "screen.sliders")
        inspect = (key("chat.inspect"), "tokens", "screen.inspect")
        match self.focused:
            case Slider():
                back = (key("chat.sliders"), "back", "screen.sliders")
                return [*stop, ("←→", "change", ""), ("Tab", "next", ""), rerun, back, *common,
                        ("0-9", "type a value", ""), ("r", "reset", "")]  # fmt: skip
            case Alternatives():
                return [*stop, ("↑↓", "choose", ""), ("Enter", "say this instead", ""),
                        (key("chat.stop"), "back to the text", "screen.stop"), *common]  # fmt: skip
            case TokenView():
                return [*stop, ("←→↑↓", "token", ""), (". ,", "changes", ""),
                        ("Enter", "alternatives", "screen.alternatives"),
                        (key("chat.other_pane"), "other side", "screen.other_pane"),
                        (key("chat.inspect"), "close", "screen.inspect"), *common, lens]  # fmt: skip
            case Examples():
                return [("↑↓", "choose", ""), ("Enter", "ask", ""), ("Esc", "to the text field", ""), *common]
        if self.editing:
            return [("Enter", "send it again", ""), (key("chat.stop"), "leave it", "screen.stop"), *common]
        if not self.turns:
            count = len(self.app.start.welcome.examples)
            examples = [(f"1-{count} Enter", "an example", "")] if count else []
            sessions = (key("chat.sessions"), "saved conversations", "screen.sessions")
            return [("Enter", "ask", ""), *examples, *common, sliders, sessions]
        if self.live:
            return [*stop, *common, sliders, inspect, lens]
        return [*common, inspect, lens, sliders, rerun,
                ("^P", "all", "app.command_palette"), (key("chat.regenerate"), "new seed", "screen.regenerate"),
                (key("chat.edit"), "edit", "screen.edit"), (key("chat.copy"), "copy", "screen.copy"),
                (key("chat.sessions"), "conversations", "screen.sessions")]  # fmt: skip

    # Sliders

    @on(Sliders.Moved)
    def _slid(self) -> None:
        self.show_guidance()
        self.rerun.moved()
        if self.auto and self.turns:
            self.rerun.ask()
