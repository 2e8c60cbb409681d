"""``llmdoctor compare --kl-budget``: the betas whose guided answers are a given KL away from the patient."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmdoctor.cli.compare_columns import Models, Plan
from llmdoctor.cli.terminal import say
from llmdoctor.show.formats import betas_text, counted

if TYPE_CHECKING:
    from llmdoctor.cli.kept_run import KeptRun
    from llmdoctor.profile import Profile


def within(budget: float, guided: Plan, models: Models, kept: "KeptRun") -> "tuple[Profile, dict[str, Any]]":
    """The profile with the betas whose mean KL per token is the budget, and what is to be said of them.

    All betas have one factor, so what they are to each other stays. The answers found last become the guided ones.
    """
    from llmdoctor.answers import estimates_to_dict, kl_per_token
    from llmdoctor.kl_budget import find_strength

    assert guided.guidance is not None
    run = kept.run
    own = guided.guidance.betas if any(guided.guidance.betas.values()) else dict.fromkeys(guided.guidance.betas, 1.0)

    def trial(strength: float) -> Plan:
        assert guided.guidance is not None
        betas = {name: float(f"{beta * strength:.4g}") for name, beta in own.items()}
        name = f"kl-budget {betas_text(betas)}"
        return replace(guided, name=name, guidance=guided.guidance.replace(betas=betas))

    def measure(strength: float) -> Any:
        plan = trial(strength)
        (column,) = models.columns([plan], kept)
        with kept.asking():
            kl = kl_per_token(run.answers(column), run.groups())
        say(f"beta {betas_text(plan.guidance.betas if plan.guidance else {})}: KL {kl.value:.4g} per token")
        return kl

    tried = find_strength(measure, budget, limit=1e4 / max(own.values()))
    best = trial(tried[-1].strength)
    assert best.guidance is not None
    kept.begin([guided.column()])
    for key in run.keys(best.name):
        if (copy := key._replace(column=guided.name)) not in run.known:
            run.known[copy] = run.known[key]
            kept.keep(copy, run.known[key])
    doctors = {
        name: settings.model_copy(update={"beta": best.guidance.betas[name]})
        for name, settings in guided.profile.doctors.items()
    }
    found = {
        "asked": budget,
        "betas": dict(best.guidance.betas),
        **estimates_to_dict({"kl_per_token": tried[-1].kl}),
        "tried": [{"betas": dict(trial(one.strength).guidance.betas), "kl_per_token": one.kl.value} for one in tried],  # type: ignore[union-attr]
        "prompts": len(run.questions),
    }
    return guided.profile.model_copy(update={"doctors": doctors}), found


def budget_text(found: dict[str, Any]) -> str:
    """Which beta, which KL, how precisely."""
    kl = found["kl_per_token"]
    over = counted(found["prompts"], "prompt")
    interval = f"95% {kl['low']:.3g} to {kl['high']:.3g}, {over}" if kl["low"] == kl["low"] else over
    off = abs(kl["value"] / found["asked"] - 1)
    return (
        f"KL budget {found['asked']:g} nats per token: beta {betas_text(found['betas'])} has {kl['value']:.4g} "
        f"({interval}), {off:.1%} off after {counted(len(found['tried']), 'trial')}"
    )
