"""The app on the models of a server: the same answers, sliders and forced tokens; a server that goes and comes back."""

from contextlib import ExitStack
from typing import Any

from llmdoctor import LLMdoctor
from llmdoctor.serving.client import RemoteDoctor
from llmdoctor.sessions import SessionStore
from llmdoctor.tui.app import ChatApp
from llmdoctor.tui.config import Config
from llmdoctor.tui.start import start_of

QUESTION = "How can I sleep better?"


def test_a_conversation_on_a_server(served: Any, drive: Any, store: SessionStore) -> None:
    here = LLMdoctor.from_profile("clinic", dtype="float32", device="cpu")
    here.sampling = here.sampling.replace(max_new_tokens=40)

    def said(**how: Any) -> list[int]:
        return [token.id for token in here.stream(QUESTION, seed=2, **how)]

    with ExitStack() as first:
        address = first.enter_context(served(here))
        remote = RemoteDoctor(address)
        app = ChatApp(start_of(remote.profile, seed=2, store=store, remote=remote), Config())

        async def steps(driver: Any) -> None:
            chat = app.chat

            def reply(which: str) -> list[int]:
                return [token.id for token in chat.turns[-1].reply(which).tokens]

            await driver.ask(QUESTION)
            assert (reply("patient"), reply("guided")) == (said(guided=False), said())
            assert address in driver.text()
            guided = chat.turns[-1].guided.tokens
            assert len(guided[3].top) >= 10

            chat.answering.force("guided", 0, 3, guided[3].top[1].id)
            await driver.idle()
            forced = [token.id for token in guided[:3]] + said(
                prefix_ids=[token.id for token in guided[:3]], force_id=guided[3].top[1].id
            )
            assert reply("guided") == forced

            await driver.type("/set helpful=3 safe=0")
            await driver.press("f5")
            await driver.idle()
            strong = here.guidance.replace(betas={"helpful": 3.0, "safe": 0.0})
            assert reply("guided") == said(guidance=strong)

            first.close()
            await driver.type("Any more?")
            await driver.until(lambda: len(chat.turns) == 2 and chat.live is None, "the error")
            assert "cannot be reached" in driver.notices
            assert chat.turns[-1].guided.end == "error"
            with served(here, port=int(address.rpartition(":")[2])):
                await driver.press("f5")
                await driver.idle()
                assert chat.turns[-1].guided.end in ("done", "length")

        drive(app, steps, size=(120, 40))
    saved = store.load(store.list()[0].id)
    assert len(saved.turns) == 2
    assert saved.profile["server"] == address
    assert saved.turns[0].guidance.betas == {"helpful": 3.0, "safe": 0.0}
