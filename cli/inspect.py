"""``llmdoctor inspect``: the token rewards of a rewards folder, chosen beside rejected."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli import charts, findings, heatmap, options, render
from llmdoctor.cli.options import option
from llmdoctor.cli.terminal import console, decorated, flat_lines, progress, put, put_json, say, waiting
from llmdoctor.errors import DataError, UsageError

if TYPE_CHECKING:
    from llmdoctor.profile import RewardSettings
    from llmdoctor.store import RewardsFolder
    from llmdoctor.types import PairScores, TokenRewards


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Rewards folder that extract wrote.")],
    *,
    pair: Annotated[str | None, option("--pair", "Show this pair only.", metavar="ID")] = None,
    limit: Annotated[
        int | None,
        option("--limit", "Pairs to show (default: 3; 1000 in the browser).", metavar="N", min=1, env="INSPECT_LIMIT"),
    ] = None,
    profile: options.ProfileName = None,
    direction: options.DirectionName = None,
    tau: options.Tau = None,
    theta: options.Theta = None,
    face: options.FaceNames = None,
    as_json: options.Json = False,
    svg: Annotated[Path | None, option("--svg", "Write a picture instead.", metavar="FILE")] = None,
    html: Annotated[Path | None, option("--html", "Write a page instead.", metavar="FILE")] = None,
    diagnose: Annotated[
        bool, option("--diagnose", "Say which behaviours the labels reward, by a fit over the face pairs.")
    ] = False,
    tui: Annotated[bool, option("--tui", "Browse the pairs in a full screen.")] = False,
) -> None:
    """Show which tokens of the chosen and the rejected answers are rewarded."""
    if sum((as_json, svg is not None, html is not None)) > 1:
        raise UsageError("choose one of --json, --svg and --html")
    if tui:
        options.require_screen("--tui", as_json or diagnose or (svg or html) is not None)
    with waiting("Reading the rewards ..."):
        from llmdoctor.store import RewardsFolder

        rewards = RewardsFolder(folder)
        settings = options.reward_settings(
            options.load(profile), available=rewards.faces, faces=face, direction=direction, tau=tau, theta=theta
        )
    if diagnose:
        _diagnose(rewards, settings, face, as_json=as_json, svg=svg, page=html)
        return
    with waiting("Reading the rewards ..."):
        from llmdoctor.faces import token_texts
        from llmdoctor.models import load_tokenizer
        from llmdoctor.rewards import face_weights, token_rewards

        tokenizer = load_tokenizer(folder / "tokenizer")
        weights = face_weights(rewards, rewards.faces, settings)

    def shown(item: "TokenRewards") -> render.RewardedText:
        title = f"{item.scores.side}, reward {float(item.rewards.sum()):+.2f}"
        pieces = token_texts(tokenizer, item.scores.response_ids)
        return render.RewardedText(title, tuple(pieces), tuple(map(float, item.rewards)))

    if tui:
        raise typer.Exit(_browse(_pick(rewards, pair, limit or 1000), settings, weights, tokenizer, shown))
    chosen = [
        (scores.chosen.pair_id, [token_rewards(side, settings, weights) for side in (scores.chosen, scores.rejected)])
        for scores in _pick(rewards, pair, limit or 3)
    ]
    prompts = [
        str(tokenizer.decode(sides[0].scores.prompt_ids.tolist(), skip_special_tokens=True)).strip()
        for _, sides in chosen
    ]
    statistics = _statistics(rewards, settings, weights)
    if as_json:
        pairs = [
            {"id": name, "prompt": prompt, **{side.scores.side: _json_side(side, shown(side)) for side in sides}}
            for (name, sides), prompt in zip(chosen, prompts, strict=True)
        ]
        document = {"folder": str(folder), "settings": settings.model_dump(mode="json"), "weights": weights}
        put_json({**document, "statistics": statistics, "pairs": pairs, "meta": rewards.meta})
        return
    heatmaps = [
        (f"{prompt}  [pair {name}]", [shown(side) for side in sides])
        for (name, sides), prompt in zip(chosen, prompts, strict=True)
    ]
    if svg is not None:
        picture = render.svg((render.rich_heatmap(*one, 110) for one in heatmaps), "llmdoctor inspect")
        _write(svg, picture)
        return
    for one in heatmaps:
        if decorated(sys.stdout):
            screen = console(sys.stdout)
            screen.print(render.rich_heatmap(*one, screen.width))
        else:
            put(render.plain_heatmap(*one) + "\n")
    source = (
        f"{len(rewards)} pairs of {rewards.meta['dataset']['source']}, scored by {rewards.meta['patient']['model']}"
    )
    used = " ".join(f"{name}={weight:.3g}" for name, weight in weights.items())
    put(f"{source}\ndirection {settings.direction}, tau {settings.tau:g}, theta {settings.theta:g}, faces {used}")
    put("\n".join(flat_lines(statistics)))


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
        _write(page, heatmap.page("llmdoctor inspect", [charts.html_diagnosis(found.diagnosis)]))
    else:
        found.show()


def _write(path: Path, text: str) -> None:
    from llmdoctor.store import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    say(f"wrote {path}")


def _browse(
    pairs: "Iterator[PairScores]",
    settings: "RewardSettings",
    weights: Mapping[str, float],
    tokenizer: Any,
    shown: Callable[["TokenRewards"], render.RewardedText],
) -> int:
    """The full-screen browser; its exit code."""
    from llmdoctor.rewards import token_rewards
    from llmdoctor.tui.app import BrowserApp, run
    from llmdoctor.tui.screens.browser import Post, RewardsScreen, rewards_item

    def source(post: Post, check: Callable[[], None]) -> None:
        for scores in pairs:
            check()
            sides = [token_rewards(side, settings, weights) for side in (scores.chosen, scores.rejected)]
            prompt = str(tokenizer.decode(scores.chosen.prompt_ids.tolist(), skip_special_tokens=True)).strip()
            post(
                rewards_item(
                    scores.chosen.pair_id, prompt, [(shown(s), s.gaps.tolist(), s.importance.tolist()) for s in sides]
                )
            )

    return run(BrowserApp(lambda: RewardsScreen(source)))


def _pick(rewards: "RewardsFolder", pair: str | None, limit: int) -> "Iterator[PairScores]":
    if pair is None:
        yield from islice(rewards, limit)
        return
    found = next((scores for scores in rewards if scores.chosen.pair_id == pair), None)
    if found is None:
        raise UsageError(f"--pair: there is no pair {pair!r} among the {len(rewards)} of {rewards.path}")
    yield found


def _statistics(
    rewards: "RewardsFolder", settings: "RewardSettings", weights: Mapping[str, float]
) -> dict[str, float | int]:
    """Over the whole folder, at these reward settings."""
    from llmdoctor.rewards import token_rewards

    pairs = tokens = rewarded = agreeing = 0
    gaps = 0.0
    with progress("Counting", len(rewards), "pairs") as advance:
        for scores in rewards:
            sums = []
            for side in (scores.chosen, scores.rejected):
                item = token_rewards(side, settings, weights)
                tokens += len(item.rewards)
                rewarded += int((item.rewards != 0).sum())
                gaps += float(abs(item.gaps).sum())
                sums.append(float(item.gaps.sum()))
            pairs += 1
            agreeing += sums[0] > sums[1]
            advance()
    return {
        "pairs": pairs,
        "tokens": tokens,
        "share_rewarded": round(rewarded / max(tokens, 1), 4),
        "mean_abs_gap": round(gaps / max(tokens, 1), 4),
        "agreement": round(agreeing / max(pairs, 1), 4),
    }


def _json_side(item: "TokenRewards", shown: render.RewardedText) -> dict[str, Any]:
    rows = zip(item.scores.response_ids, shown.pieces, item.rewards, item.gaps, item.importance, strict=True)
    tokens = [
        {"id": int(i), "text": text, "reward": float(r), "gap": float(g), "importance": float(s)}
        for i, text, r, g, s in rows
    ]
    return {"reward": float(item.rewards.sum()), "gap": float(item.gaps.sum()), "tokens": tokens}
