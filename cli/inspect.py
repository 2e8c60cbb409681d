"""``llmdoctor inspect``: the token rewards of a rewards folder, chosen beside rejected."""

import heapq
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli import charts, findings, options
from llmdoctor.cli.heatmap import heat_legend, plain_heatmap, rich_heatmap
from llmdoctor.cli.options import option
from llmdoctor.cli.picture import svg as picture
from llmdoctor.cli.statistics_table import plain_statistics, rich_statistics
from llmdoctor.cli.terminal import console, decorated, progress, put, put_json, say, waiting
from llmdoctor.errors import DataError, UsageError
from llmdoctor.show.formats import short_name
from llmdoctor.show.page import rewards_page
from llmdoctor.show.rewards import RewardedText, ShownPair, limit_of
from llmdoctor.show.text import prompt_end

if TYPE_CHECKING:
    from llmdoctor.profile import Profile
    from llmdoctor.records import PairScores, TokenRewards
    from llmdoctor.settings import PatientSettings, RewardSettings
    from llmdoctor.token_rewards.diagnosis import Diagnosis
    from llmdoctor.token_rewards.folder import RewardsFolder
    from llmdoctor.token_rewards.summary import FaceDifference, Statistics

_SHOWN, _SHOWN_ON_PAGE, _BROWSED = 3, 20, 1000


@options.derived
def inspect(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Rewards folder that extract wrote.", show_default=False)
    ] = None,
    *,
    text: Annotated[
        str | None, option("--text", "Look at this answer instead, with the profile's patient.", metavar="ANSWER")
    ] = None,
    prompt: Annotated[str | None, option("--prompt", "What --text answers.", metavar="TEXT")] = None,
    pair: Annotated[str | None, option("--pair", "Show this pair only.", metavar="ID")] = None,
    contains: Annotated[
        str | None, option("--contains", "Only pairs with this text in prompt or answers.", metavar="TEXT")
    ] = None,
    worst: Annotated[
        int | None, option("--worst", "Show the N pairs whose gap contradicts the label most.", metavar="N", min=1)
    ] = None,
    limit: Annotated[
        int | None,
        option(
            "--limit",
            f"Pairs to show (default: {_SHOWN}; {_SHOWN_ON_PAGE} on a page; {_BROWSED} in the browser).",
            metavar="N",
            min=1,
            env="INSPECT_LIMIT",
        ),
    ] = None,
    diagnose: Annotated[
        bool, option("--diagnose", "Say which behaviours the labels reward, by a fit over the face pairs.")
    ] = False,
    profile: options.ProfileName = None,
    patient: options.Patient = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    face: options.FaceNames = None,
    rewarding: options.Rewards,
    as_json: options.Json = False,
    svg: Annotated[Path | None, option("--svg", "Write a picture instead.", metavar="FILE")] = None,
    html: Annotated[Path | None, option("--html", "Write a page instead.", metavar="FILE")] = None,
    tui: Annotated[bool, option("--tui", "Browse the pairs in a full screen.")] = False,
) -> None:
    """Show which tokens of the chosen and the rejected answers are rewarded, and what the rewards add up to."""
    from llmdoctor.profile import override

    if sum((as_json, svg is not None, html is not None)) > 1:
        raise UsageError("choose one of --json, --svg and --html")
    if pair is not None and worst is not None:
        raise UsageError("choose one of --pair and --worst")
    if text is not None:
        if folder is not None or tui or diagnose or any(given is not None for given in (pair, contains, worst)):
            raise UsageError("--text looks at one answer: leave out DIR, its filters, --diagnose and --tui")
        chosen = options.load(profile)
        model = override(chosen.patient, model=patient, device=device, dtype=dtype)
        given = {**rewarding, "faces": tuple(face) if face else None}
        _look_at(
            text, prompt or "", chosen, profile, model, given, trust_remote_code, as_json=as_json, svg=svg, page=html
        )
        return
    if folder is None:
        raise UsageError("expected a rewards folder, DIR, or an answer, --text")
    if prompt is not None:
        raise UsageError("--prompt goes with --text: a rewards folder holds its own prompts")
    if tui:
        options.require_screen("--tui", as_json or diagnose or (svg or html) is not None)
    with waiting("Reading the rewards ..."):
        from llmdoctor.token_rewards.folder import RewardsFolder

        rewards = RewardsFolder(folder)
        own = options.fitting(options.load(profile), profile, rewards.meta["patient"]["fingerprint"])
        settings = options.reward_settings(own, available=rewards.faces, faces=face, **rewarding)
    if diagnose:
        _diagnose(rewards, settings, face, as_json=as_json, svg=svg, page=html)
        return
    with waiting("Reading the rewards ..."):
        from llmdoctor.models import load_tokenizer
        from llmdoctor.token_rewards.fit import face_weights

        tokenizer = load_tokenizer(folder / "tokenizer")
        weights = face_weights(rewards, rewards.faces, settings)
    look = _Look(rewards, settings, weights, tokenizer)
    if tui:
        raise typer.Exit(_browse(look, look.pick(pair, contains, limit or worst or _BROWSED)))
    wanted = worst or limit or (_SHOWN_ON_PAGE if html else _SHOWN)
    shown, statistics, differences = look.all(pair=pair, contains=contains, worst=worst is not None, limit=wanted)
    findings.warn(differences)
    if as_json:
        document: dict[str, Any] = {
            "folder": str(folder),
            "settings": settings.model_dump(mode="json"),
            "weights": weights,
        }
        document |= {"statistics": statistics.as_dict(), "face_differences": [d.as_dict() for d in differences]}
        put_json({**document, "pairs": [look.json(sides) for sides in shown], "meta": rewards.meta})
        return
    pairs = [look.shown(sides) for sides in shown]
    heading = _heading(rewards, settings, weights, statistics, contains)
    if svg is not None:
        from rich.text import Text

        from llmdoctor.token_rewards.summary import EDGES

        top = limit_of(pairs)
        pictures = [rich_heatmap(_title(one), one.sides, 110, top) for one in pairs]
        numbers = [Text("\n".join(heading)), Text(), rich_statistics(statistics, EDGES)]
        _write(svg, picture([*pictures, heat_legend(top), Text(), *numbers], "llmdoctor inspect"))
    elif html is not None:
        _write(html, rewards_page(pairs, heading=heading, statistics=statistics))
    else:
        _print(heading, pairs, statistics)


def _heading(
    rewards: "RewardsFolder",
    settings: "RewardSettings",
    weights: Mapping[str, float],
    statistics: "Statistics",
    contains: str | None,
) -> list[str]:
    """Where the rewards come from, and how they were made."""
    source = f"pairs of {rewards.meta['dataset']['source']}, scored by {rewards.meta['patient']['model']}"
    counted = f"{len(rewards)} {source}"
    if contains is not None:
        counted = f"{statistics.pairs} of {len(rewards)} {source}: those that contain {contains!r}"
    used = " ".join(f"{name}={weight:.3g}" for name, weight in weights.items())
    return [counted, f"direction {settings.direction}, tau {settings.tau:g}, theta {settings.theta:g}, faces {used}"]


def _title(pair: ShownPair) -> str:
    return f"{prompt_end(pair.prompt)}  [pair {pair.name}]"


def _print(heading: Sequence[str], pairs: Sequence[ShownPair], statistics: "Statistics") -> None:
    from llmdoctor.token_rewards.summary import EDGES

    if not decorated(sys.stdout):
        for one in pairs:
            put(plain_heatmap(f"{one.prompt}  [pair {one.name}]", one.sides) + "\n")
        put("\n".join([*heading, "", plain_statistics(statistics, EDGES)]))
        return
    screen = console(sys.stdout)
    top = limit_of(pairs)
    for one in pairs:
        screen.print(rich_heatmap(_title(one), one.sides, screen.width, top))
    screen.print(heat_legend(top))
    screen.print("\n" + "\n".join(heading) + "\n")
    screen.print(rich_statistics(statistics, EDGES))


class _Look:
    """A rewards folder at given reward settings, streamed."""

    def __init__(
        self, rewards: "RewardsFolder", settings: "RewardSettings", weights: Mapping[str, float], tokenizer: Any
    ) -> None:
        self.rewards, self.settings, self.weights, self.tokenizer = rewards, settings, weights, tokenizer

    def all(
        self, *, pair: str | None, contains: str | None, worst: bool, limit: int
    ) -> "tuple[list[tuple[TokenRewards, TokenRewards]], Statistics, tuple[FaceDifference, ...]]":
        """In one pass, holding ``limit`` pairs: those to show, and the statistics of all that match ``contains``."""
        from llmdoctor.token_rewards.summary import FaceDifferences, RewardCounter, margin

        ids = range(max(len(self.tokenizer), max(self.tokenizer.get_vocab().values()) + 1))
        special = [i for i in self.tokenizer.all_special_ids if i in ids]
        counter = RewardCounter(self.tokenizer.convert_ids_to_tokens(list(ids)), self.text, special)
        differences = FaceDifferences(tuple(self.weights))
        first: list[tuple[TokenRewards, TokenRewards]] = []
        least: list[tuple[float, int, tuple[TokenRewards, TokenRewards]]] = []  # a heap, the least contradictory first
        with progress("Counting", len(self.rewards), "pairs") as advance:
            for number, scores in enumerate(self.rewards):
                advance()
                if contains is not None and not self._contains(scores, contains):
                    continue
                sides = self.sides(scores)
                counter.add(*sides)
                differences.add(scores)
                if pair is not None:
                    if scores.chosen.pair_id == pair:
                        first.append(sides)
                elif worst:
                    heapq.heappush(least, (-margin(*sides), -number, sides))
                    if len(least) > limit:
                        heapq.heappop(least)
                elif len(first) < limit:
                    first.append(sides)
        statistics = counter.result()
        if contains is not None and statistics.pairs == 0:
            raise UsageError(
                f"--contains: none of the {len(self.rewards)} pairs of {self.rewards.path} has {contains!r}"
            )
        if pair is not None and not first:
            raise self._no_pair(pair)
        chosen = first or [sides for _, _, sides in sorted(least, key=lambda item: item[:2], reverse=True)]
        return chosen, statistics, differences.result()

    def pick(self, pair: str | None, contains: str | None, limit: int) -> "Iterator[PairScores]":
        """The pairs themselves, as they are read."""
        matching = (
            scores
            for scores in self.rewards
            if (pair is None or scores.chosen.pair_id == pair)
            and (contains is None or self._contains(scores, contains))
        )
        return islice(matching, limit)

    def _no_pair(self, pair: str) -> UsageError:
        return UsageError(f"--pair: there is no pair {pair!r} among the {len(self.rewards)} of {self.rewards.path}")

    def _contains(self, scores: "PairScores", text: str) -> bool:
        parts = (scores.chosen.prompt_ids, scores.chosen.response_ids, scores.rejected.response_ids)
        return any(text.casefold() in self.text(ids.tolist()).casefold() for ids in parts)

    def text(self, ids: list[int]) -> str:
        """Token ids as text, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def sides(self, scores: "PairScores") -> "tuple[TokenRewards, TokenRewards]":
        """The token rewards of both responses."""
        from llmdoctor.token_rewards.formula import token_rewards

        made = (token_rewards(side, self.settings, self.weights) for side in (scores.chosen, scores.rejected))
        return next(made), next(made)

    def prompt(self, scores: "TokenRewards") -> str:
        """What was asked."""
        return self.text(scores.scores.prompt_ids.tolist()).strip()

    def shown(self, sides: "Sequence[TokenRewards]") -> ShownPair:
        """A pair as screens show it."""
        responses = tuple(rewarded_text(self.tokenizer, side) for side in sides)
        return ShownPair(sides[0].scores.pair_id, self.prompt(sides[0]), responses)

    def json(self, sides: "Sequence[TokenRewards]") -> dict[str, Any]:
        """A pair as ``--json`` gives it."""
        named: dict[str, Any] = {
            side.scores.side: json_side(side, rewarded_text(self.tokenizer, side)) for side in sides
        }
        return {"id": sides[0].scores.pair_id, "prompt": self.prompt(sides[0]), **named}


def rewarded_text(tokenizer: Any, item: "TokenRewards") -> RewardedText:
    """One response as screens show it."""
    from llmdoctor.text import token_texts

    gap = float(item.gaps.sum())
    title = f"{item.scores.side}, reward {float(item.rewards.sum()):+.2f}, gap {gap:+.2f}, {len(item.rewards)} tokens"
    pieces = token_texts(tokenizer, item.scores.response_ids)
    numbers = (tuple(map(float, values)) for values in (item.rewards, item.gaps, item.importance))
    return RewardedText(title, tuple(pieces), *numbers)


def json_side(item: "TokenRewards", shown: RewardedText) -> dict[str, Any]:
    """One response as ``--json`` gives it."""
    rows = zip(item.scores.response_ids, shown.pieces, shown.rewards, shown.gaps, shown.importance, strict=True)
    tokens = [{"id": int(i), "text": text, "reward": r, "gap": g, "importance": s} for i, text, r, g, s in rows]
    return {"reward": float(item.rewards.sum()), "gap": float(item.gaps.sum()), "tokens": tokens}


def _look_at(
    text: str,
    prompt: str,
    profile: "Profile",
    named: str | None,
    model: "PatientSettings",
    given: "Mapping[str, Any]",
    trust_remote_code: bool,
    *,
    as_json: bool,
    svg: Path | None,
    page: Path | None,
) -> None:
    """The heatmap of one answer that somebody wrote."""
    from llmdoctor.cli.extract import chosen_faces
    from llmdoctor.profile import override

    settings = override(profile.rewards, **given)
    if settings.direction == "fitted":
        raise UsageError("--direction fitted needs labelled pairs: give a rewards folder, or another direction")
    faces = chosen_faces(profile, settings.faces)
    with waiting(f"Loading {short_name(model.model)} ..."):
        from llmdoctor.models import load_patient
        from llmdoctor.token_rewards.answer import score_answer
        from llmdoctor.token_rewards.fit import face_weights
        from llmdoctor.token_rewards.formula import token_rewards

        loaded = load_patient(model.model, dtype=model.dtype, device=model.device, trust_remote_code=trust_remote_code)
        scores = score_answer(loaded, faces, prompt, text)
    settings = override(options.fitting(profile, named, loaded.fingerprint).rewards, **given)
    weights = face_weights((), faces, settings)
    item = token_rewards(scores, settings, weights)
    shown = rewarded_text(loaded.tokenizer, item)
    shown = replace(shown, title=shown.title.replace("chosen, ", "answer, ", 1))
    if as_json:
        document: dict[str, Any] = {"patient": model.model, "settings": settings.model_dump(mode="json")}
        document |= {"weights": weights, "prompt": prompt, "answer": text}
        put_json({**document, **json_side(item, shown)})
        return
    one = ShownPair("", prompt or "no prompt", (shown,))
    used = " ".join(f"{name}={weight:.3g}" for name, weight in weights.items())
    used = f"direction {settings.direction}, tau {settings.tau:g}, theta {settings.theta:g}, faces {used}"
    source = f"scored by {model.model}\n{used}"
    top = limit_of([one])
    if svg is not None:
        from rich.text import Text

        drawn = rich_heatmap(prompt_end(one.prompt), one.sides, 110, top)
        _write(svg, picture([drawn, heat_legend(top), Text(source)], "llmdoctor inspect"))
    elif page is not None:
        _write(page, rewards_page([one], heading=source.splitlines()))
    elif decorated(sys.stdout):
        screen = console(sys.stdout)
        screen.print(rich_heatmap(prompt_end(one.prompt), one.sides, screen.width, top))
        screen.print(heat_legend(top))
        screen.print(source)
    else:
        put(f"{plain_heatmap(one.prompt, one.sides)}\n\n{source}")


def _diagnose(
    rewards: "RewardsFolder",
    settings: "RewardSettings",
    faces: Sequence[str] | None,
    *,
    as_json: bool,
    svg: Path | None,
    page: Path | None,
) -> None:
    """The diagnosis alone, on stdout or in a file."""
    found = findings.find(rewards, settings, faces)
    if found.diagnosis is None:
        raise DataError(f"a diagnosis needs at least 2 pairs (some hundreds to say much), got {len(rewards)}")
    if as_json:
        put_json({"folder": str(rewards.path), **found.as_dict(), "meta": rewards.meta})
    elif svg is not None:
        _write(svg, charts.svg_diagnosis(found.diagnosis))
    elif page is not None:
        examples = _examples(rewards, settings, found.diagnosis)
        _write(page, rewards_page(examples, diagnosis=charts.html_diagnosis(found.diagnosis)))
    else:
        found.show()


def _examples(rewards: "RewardsFolder", settings: "RewardSettings", diagnosis: "Diagnosis") -> list[ShownPair]:
    """The pairs that the diagnosis names, with the rewards that its weights give."""
    from llmdoctor.models import load_tokenizer

    named: dict[str, list[str]] = {}
    for face in diagnosis.faces:
        for examples, relation in ((face.best, "explained best by"), (face.worst, "contradicted most by")):
            for example in examples:
                named.setdefault(example.pair_id, []).append(f"{relation} {face.name} ({example.contribution:+.2g})")
    weights = {face.name: face.weight.value for face in diagnosis.faces}
    fitted = settings.model_copy(update={"direction": "fitted", "faces": None})
    look = _Look(rewards, fitted, weights, load_tokenizer(rewards.path / "tokenizer"))
    found = {
        scores.chosen.pair_id: look.shown(look.sides(scores)) for scores in rewards if scores.chosen.pair_id in named
    }
    return [replace(found[name], name=", ".join([name, *said])) for name, said in named.items()]


def _write(path: Path, text: str) -> None:
    from llmdoctor.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    say(f"wrote {path}")


def _browse(look: _Look, pairs: "Iterator[PairScores]") -> int:
    """The full-screen browser; its exit code."""
    from llmdoctor.tui.launch import browse_rewards

    return browse_rewards(look.shown(look.sides(scores)) for scores in pairs)
