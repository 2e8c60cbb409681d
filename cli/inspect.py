"""``llmdoctor inspect``: the token rewards of a rewards folder, chosen beside rejected."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli import charts, findings, options
from llmdoctor.cli.heatmap import heat_legend, plain_heatmap, rich_heatmap
from llmdoctor.cli.options import option
from llmdoctor.cli.picture import svg as picture
from llmdoctor.cli.reward_reader import RewardReader, json_side, rewarded_text
from llmdoctor.cli.statistics_table import plain_statistics, rich_statistics
from llmdoctor.cli.terminal import console, decorated, put, put_json, say, waiting
from llmdoctor.errors import DataError, UsageError
from llmdoctor.harmless import require_unicode
from llmdoctor.show.formats import counted, short_name
from llmdoctor.show.page import rewards_page
from llmdoctor.show.rewards import ShownPair, limits_of
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
    loading: options.HowLoaded,
    trust_remote_code: options.TrustRemoteCode = False,
    face: options.FaceNames = None,
    rewarding: options.Rewards,
    show: Annotated[
        list[str] | None,
        option(
            "--show",
            "What is marked: reward, gap or probe; repeatable (default: reward; with --text reward and gap).",
            metavar="WHAT",
        ),
    ] = None,
    as_json: options.Json = False,
    svg: Annotated[Path | None, option("--svg", "Write a picture instead.", metavar="FILE")] = None,
    html: Annotated[Path | None, option("--html", "Write a page instead.", metavar="FILE")] = None,
    tui: Annotated[bool, option("--tui", "Browse the pairs in a full screen.")] = False,
) -> None:
    """Show which tokens of the chosen and the rejected answers are rewarded, and what the rewards add up to."""
    from llmdoctor.profile import override

    options.require_outputs((svg, html))
    if sum((as_json, svg is not None, html is not None)) > 1:
        raise UsageError("choose one of --json, --svg and --html")
    if pair is not None and worst is not None:
        raise UsageError("choose one of --pair and --worst")
    if unknown := set(show or ()) - {"reward", "gap", "probe"}:
        raise UsageError(f"--show: expected reward, gap or probe, got {min(unknown)!r}")
    if text is not None:
        if folder is not None or tui or diagnose or any(given is not None for given in (pair, contains, worst)):
            raise UsageError("--text looks at one answer: leave out DIR, its filters, --diagnose and --tui")
        require_unicode(text, "--text")
        require_unicode(prompt or "", "--prompt")
        chosen = options.load(profile)
        model = override(chosen.patient, model=patient, **loading)
        given = {**rewarding, "faces": tuple(face) if face else None}
        _look_at(
            text,
            prompt or "",
            chosen,
            profile,
            model,
            given,
            trust_remote_code,
            shows=tuple(show or ("reward", "gap")),
            as_json=as_json,
            svg=svg,
            page=html,
        )
        return
    if folder is None:
        raise UsageError("expected a rewards folder, DIR, or an answer, --text")
    if prompt is not None:
        raise UsageError("--prompt goes with --text: a rewards folder holds its own prompts")
    if show and (tui or diagnose):
        raise UsageError("--show goes with the pairs: leave out --tui and --diagnose")
    if tui:
        options.require_screen("--tui", as_json or diagnose or (svg or html) is not None)
    with waiting("Reading the rewards ..."):
        from llmdoctor.token_rewards.folder import RewardsFolder

        rewards = RewardsFolder(folder)
        own = options.fitting(options.load(profile), profile, rewards.meta["patient"]["fingerprint"])
        settings = options.reward_settings(own, available=rewards.signals, faces=face, **rewarding)
    if diagnose:
        _diagnose(rewards, settings, face, as_json=as_json, svg=svg, page=html)
        return
    with waiting("Reading the rewards ..."):
        from llmdoctor.models import load_tokenizer
        from llmdoctor.token_rewards.fit import face_weights

        tokenizer = load_tokenizer(folder / "tokenizer")
        weights = face_weights(rewards, rewards.signals, settings)
    look = RewardReader(rewards, settings, weights, tokenizer)
    if tui:
        raise typer.Exit(_browse(look, look.pick(pair, contains, limit or worst or _BROWSED)))
    wanted = worst or limit or (_SHOWN_ON_PAGE if html else _SHOWN)
    found = look.all(pair=pair, contains=contains, worst=worst is not None, limit=wanted)
    _show(look, *found, contains, tuple(show or ("reward",)), as_json=as_json, svg=svg, page=html)


def _show(
    look: RewardReader,
    shown: "Sequence[Sequence[TokenRewards]]",
    statistics: "Statistics",
    differences: "Sequence[FaceDifference]",
    contains: str | None,
    shows: Sequence[str],
    *,
    as_json: bool,
    svg: Path | None,
    page: Path | None,
) -> None:
    """The pairs and the statistics, on stdout or in a file."""
    rewards, settings, weights = look.rewards, look.settings, look.weights
    if "probe" in shows and rewards.probe is None:
        from llmdoctor.token_rewards.formula import NO_PROBE

        raise UsageError(f"--show probe: {NO_PROBE}")
    findings.warn(differences)
    _say_if_nothing_is_left("the pairs shown", [side for sides in shown for side in sides], settings)
    if as_json:
        document: dict[str, Any] = {"folder": str(rewards.path), "settings": settings.model_dump(mode="json")}
        document |= {"weights": weights, "statistics": statistics.as_dict()}
        document |= {"face_differences": [difference.as_dict() for difference in differences]}
        put_json({**document, "pairs": [look.json(sides) for sides in shown], "meta": rewards.meta})
        return
    pairs = [
        replace(
            one,
            name=one.name if what == "reward" else f"{one.name}, {what}",
            sides=tuple(s.by(what) for s in one.sides),
        )
        for one in map(look.shown, shown)
        for what in shows
    ]
    heading = _heading(rewards, settings, weights, statistics, contains)
    if svg is not None:
        from rich.text import Text

        top = limits_of(pairs)
        pictures = [rich_heatmap(_title(one), one.sides, 110, top) for one in pairs]
        numbers = [Text("\n".join(heading)), Text(), rich_statistics(statistics)]
        _write(svg, picture([*pictures, heat_legend(top), Text(), *numbers], "llmdoctor inspect"))
    elif page is not None:
        _write(page, rewards_page(pairs, heading=heading, statistics=statistics))
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
    source = f"{rewards.meta['dataset']['source']}, scored by {rewards.meta['patient']['model']}"
    first = f"{counted(len(rewards), 'pair')} of {source}"
    if contains is not None:
        first = f"{statistics.pairs} of {first}: those that contain {contains!r}"
    used = " ".join(f"{name}={weight:.3g}" for name, weight in weights.items())
    return [first, f"direction {settings.direction}, tau {settings.tau:g}, theta {settings.theta:g}, faces {used}"]


def _say_if_nothing_is_left(what: str, sides: "Sequence[TokenRewards]", settings: "RewardSettings") -> None:
    """Why nothing is marked, and what to do."""
    if any(side.rewards.any() for side in sides):
        return
    most = max(float(side.importance.max()) for side in sides)
    say(
        f"note: tau {settings.tau:g} and theta {settings.theta:g} prune every token of {what}, the greatest importance "
        f"here is {most:.2g}. Lower them (--tau 1 --theta 0.3); --show gap marks the raw gap"
    )


def _title(pair: ShownPair) -> str:
    return f"{prompt_end(pair.prompt)}  [pair {pair.name}]"


def _print(heading: Sequence[str], pairs: Sequence[ShownPair], statistics: "Statistics") -> None:
    if not decorated(sys.stdout):
        for one in pairs:
            put(plain_heatmap(f"{one.prompt}  [pair {one.name}]", one.sides) + "\n")
        put("\n".join([*heading, "", plain_statistics(statistics)]))
        return
    screen = console(sys.stdout)
    top = limits_of(pairs)
    for one in pairs:
        screen.print(rich_heatmap(_title(one), one.sides, screen.width, top))
    screen.print(heat_legend(top))
    screen.print("\n" + "\n".join(heading) + "\n")
    screen.print(rich_statistics(statistics))


def _look_at(
    text: str,
    prompt: str,
    profile: "Profile",
    named: str | None,
    model: "PatientSettings",
    given: "Mapping[str, Any]",
    trust_remote_code: bool,
    *,
    shows: Sequence[str],
    as_json: bool,
    svg: Path | None,
    page: Path | None,
) -> None:
    """The heatmap of one answer that somebody wrote."""
    from llmdoctor.cli.extract import chosen_faces
    from llmdoctor.profile import override
    from llmdoctor.settings import OF_STATES

    if "probe" in shows:
        raise UsageError("--show probe needs a rewards folder that extract --probe wrote: leave it out, or --text")
    settings = override(profile.rewards, **given)
    if settings.direction in {"fitted", *OF_STATES}:
        raise UsageError(
            f"--direction {settings.direction} needs labelled pairs: give a rewards folder, or another one"
        )
    faces = chosen_faces(profile, settings.faces)
    with waiting(f"Loading {short_name(model.model)} ..."):
        from llmdoctor.models import load_patient
        from llmdoctor.token_rewards.answer import score_answer
        from llmdoctor.token_rewards.fit import face_weights
        from llmdoctor.token_rewards.formula import token_rewards

        loaded = load_patient(model.model, trust_remote_code=trust_remote_code, **model.loading())
        scores = score_answer(loaded, faces, prompt, text)
    settings = override(options.fitting(profile, named, loaded.fingerprint).rewards, **given)
    weights = face_weights((), faces, settings)
    item = token_rewards(scores, settings, weights)
    shown = rewarded_text(loaded.tokenizer, item)
    shown = replace(shown, title=shown.title.replace("chosen, ", "answer, ", 1))
    _say_if_nothing_is_left("this answer", [item], settings)
    if as_json:
        document: dict[str, Any] = {"patient": model.model, "settings": settings.model_dump(mode="json")}
        document |= {"weights": weights, "prompt": prompt, "answer": text}
        put_json({**document, **json_side(item, shown)})
        return
    one = ShownPair("", prompt or "no prompt", tuple(shown.by(what) for what in shows))
    used = " ".join(f"{name}={weight:.3g}" for name, weight in weights.items())
    used = f"direction {settings.direction}, tau {settings.tau:g}, theta {settings.theta:g}, faces {used}"
    source = f"scored by {model.model}\n{used}"
    top = limits_of([one])
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
    look = RewardReader(rewards, fitted, weights, load_tokenizer(rewards.path / "tokenizer"))
    found = {
        scores.chosen.pair_id: look.shown(look.sides(scores)) for scores in rewards if scores.chosen.pair_id in named
    }
    return [replace(found[name], name=", ".join([name, *said])) for name, said in named.items()]


def _write(path: Path, text: str) -> None:
    from llmdoctor.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    say(f"wrote {path}")


def _browse(look: RewardReader, pairs: "Iterator[PairScores]") -> int:
    """The full-screen browser; its exit code."""
    from llmdoctor.tui.launch import browse_rewards

    return browse_rewards(look.shown(look.sides(scores)) for scores in pairs)
