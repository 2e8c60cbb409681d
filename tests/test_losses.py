"""Flow losses against float64 double sums, hand-worked values, and an enumerable world whose optimum is known."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llmdoctor.decoding.product import draw, product
from llmdoctor.settings import Guidance, Sampling
from llmdoctor.training.losses import anchored, log_flow, state_mask, subtb, value_discrimination

WEIGHTS = [1.0, 1 - 1e-12, 0.999999, 0.97, 0.5, 1e-3]


def ragged(lengths: list[int]) -> Tensor:
    """[B, T] mask of rows of these lengths."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def subtb_by_pairs(flow_N: Tensor, weight: float, *, summed: bool = False) -> Tensor:
    """The definition: every pair m < n by itself."""
    total, norm = flow_N.new_zeros(()), 0.0
    for n in range(len(flow_N)):
        for m in range(n):
            total = total + weight ** (n - m - 1) * (flow_N[n] - flow_N[m]) ** 2
            norm += weight ** (n - m - 1)
    return total if summed else total / max(norm, 1e-300)


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 14 / 3), (1 - 1e-5, 14 / 3), (1 - 1e-9, 14 / 3), (0.5, 3.8)])
def test_subtb_golden(weight: float, expected: float):
    """f = 0, 1, 3: (0,1) -> 1, (1,2) -> 4, (0,2) -> 9. Mean 14/3, also in the limit of weights that float32 sees as 1.

    At weight 1/2: (1 + 4 + 9/2) / (1 + 1 + 1/2) = 3.8.
    """
    flow, mask = torch.tensor([[0.0, 1.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert subtb(flow, mask, weight).item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("summed", [False, True], ids=["mean", "sum"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_subtb_is_the_double_sum_whatever_the_padding_holds(weight: float, summed: bool):
    lengths = [9, 1, 0, 5, 16, 2]  # tokens; a row of no tokens has one state and no pair
    mask = state_mask(ragged(lengths))
    generator = torch.Generator().manual_seed(0)
    flow = (3 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)).masked_fill(~mask, 1e6)
    flow.requires_grad_()
    fast = subtb(flow, mask, weight, total=summed)
    (fast_grad,) = torch.autograd.grad((fast * torch.arange(1, 7)).sum(), flow)
    rows = zip(flow, lengths, strict=True)
    slow = torch.stack([subtb_by_pairs(row[: length + 1], weight, summed=summed) for row, length in rows])
    (slow_grad,) = torch.autograd.grad((slow * torch.arange(1, 7)).sum(), flow)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=0)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-9, atol=1e-10)
    assert (fast_grad[~mask] == 0).all()


@pytest.mark.parametrize("weight", [1.0, 0.999999, 0.9])
def test_subtb_of_a_long_row_survives_float32(weight: float):
    """2048 tokens whose log flow is far from 0: the loss equals that of float64 on the same numbers."""
    steps = torch.randn(1, 2048, generator=torch.Generator().manual_seed(1))
    flow = torch.nn.functional.pad(steps.cumsum(dim=1), (1, 0)) - 3000
    exact = flow[0].double()
    distance = torch.arange(len(exact))[None] - torch.arange(len(exact))[:, None]
    weights = torch.where(distance > 0, weight ** (distance - 1).clamp(min=0).double(), 0.0)
    expected = (weights * (exact[None] - exact[:, None]) ** 2).sum() / weights.sum()
    found = subtb(flow, torch.ones_like(flow, dtype=torch.bool), weight)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_log_flow_golden():
    """rho 2, r = .5, -1, p = 1/2, 1/4, ref = 1/4, 1/4, log V = 1, 2, 3.

    Absolute: f_0 = 1; f_1 = 2 + 1 + ln 2; f_2 = 3 + (1 - 2) + ln 2 + ln 4 = 2 + 3 ln 2. Relative, where p / ref is 2
    and 1: f_1 = 3 - ln 2, f_2 = 2 - ln 2. The third token is padding and may hold anything.
    """
    nan, log2 = math.nan, math.log(2)
    mask = torch.tensor([[True, True, False]])
    rewards = torch.tensor([[0.5, -1.0, nan]])
    logprobs, ref = torch.tensor([[0.5, 0.25, nan]]).log(), torch.tensor([[0.25, 0.25, nan]]).log()
    values = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    absolute = log_flow(logprobs, rewards, values, mask, rho=2)
    relative = log_flow(logprobs, rewards, values, mask, rho=2, ref_logprobs_B_T=ref)
    torch.testing.assert_close(absolute[0, :3], torch.tensor([1, 3 + log2, 2 + 3 * log2]))
    torch.testing.assert_close(relative[0, :3], torch.tensor([1, 3 - log2, 2 - log2]))
    assert subtb(relative, state_mask(mask)).isfinite().all()


def test_anchor_is_at_the_last_state_of_each_row():
    values = torch.arange(1.0, 13.0).reshape(3, 4).requires_grad_()
    found = anchored(values, ragged([3, 1, 2]))
    assert found.tolist() == [[1, 2, 3, 0], [5, 0, 7, 8], [9, 10, 0, 12]]
    found.sum().backward()
    assert values.grad.tolist() == [[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1]]


def test_value_discrimination_golden():
    """gamma 1, differences .3, 2, -1: (.7 + 0 + 2) / 3 = .9. Only pairs inside the margin pull, a third each."""
    preferred = torch.tensor([0.3, 5.0, -2.0], requires_grad=True)
    loss = value_discrimination(preferred, torch.tensor([0.0, 3.0, -1.0]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.9)
    assert preferred.grad.tolist() == pytest.approx([-1 / 3, 0, -1 / 3])


def test_the_hinge_on_v_itself():
    """gamma 1: V 2 against 1.5 gives 1 - .5, V e^2 against 1 is beyond the margin; nothing overflows."""
    preferred = torch.tensor([2.0, math.exp(2)]).log().requires_grad_()
    loss = value_discrimination(preferred, torch.tensor([1.5, 1.0]).log(), 1.0, log=False)
    loss.backward()
    assert loss.item() == pytest.approx(0.25)
    assert preferred.grad.tolist() == pytest.approx([-1.0, 0])  # half of dV / d log V = V
    assert value_discrimination(torch.tensor([-500.0]), torch.tensor([500.0]), 1.0, log=False).isfinite()


def test_value_discrimination_without_pairs_is_a_zero_that_trains():
    none = torch.zeros(0, requires_grad=True)
    loss = value_discrimination(none, none, 1.0)
    loss.backward()
    assert loss.item() == 0


@dataclass
class World:
    """Every answer over the tokens {0, 1, 2} that ends with its first 2 or with its fourth token.

    A state is a prefix without a 2. ``ref_S_V`` is pi_ref(y | s) and ``reward_S_V`` r(s, y), both tables. An answer's
    row in ``states_R_T`` and ``tokens_R_T`` lists the states it passes and the tokens it takes.
    """

    ref_S_V: Tensor
    reward_S_V: Tensor
    prefixes: list[tuple[int, ...]]
    states_R_T: Tensor
    tokens_R_T: Tensor
    mask_R_T: Tensor
    rho = 1.7

    @classmethod
    def make(cls, seed: int) -> "World":
        prefixes: list[tuple[int, ...]] = [()]
        for prefix in prefixes:
            if len(prefix) < 3:
                prefixes += [(*prefix, 0), (*prefix, 1)]
        answers = [(*prefix, y) for prefix in prefixes for y in range(3) if y == 2 or len(prefix) == 3]
        generator = torch.Generator().manual_seed(seed)
        ref = torch.randn(len(prefixes), 3, generator=generator, dtype=torch.float64).softmax(dim=1)
        reward = torch.randn(len(prefixes), 3, generator=generator, dtype=torch.float64)
        states = torch.zeros(len(answers), 4, dtype=torch.long)
        tokens, mask = states.clone(), ragged([len(answer) for answer in answers])
        for i, answer in enumerate(answers):
            for t, y in enumerate(answer):
                states[i, t], tokens[i, t] = prefixes.index(answer[:t]), y
        return cls(ref, reward, prefixes, states, tokens, mask)

    def along(self, table_S_V: Tensor) -> Tensor:
        """The table's entries along every answer [R, T]."""
        return table_S_V[self.states_R_T, self.tokens_R_T]

    def target_R(self, relative: bool) -> Tensor:
        """pi(y) ∝ pi_ref(y) exp(rho sum r), by enumerating the answers; absolute flow has no pi_ref."""
        score = self.rho * self.along(self.reward_S_V) + (self.along(self.ref_S_V).log() if relative else 0)
        return (score * self.mask_R_T).sum(dim=1).softmax(dim=0)

    def optimum(self, relative: bool) -> tuple[Tensor, Tensor]:
        """The policy table and log V of every state, both from the target's mass behind each prefix."""
        mass = {
            prefix: self.target_R(relative)[self.passing(prefix)].sum() for prefix in [*self.prefixes, *self.answers()]
        }
        policy = torch.stack(
            [torch.stack([mass[(*prefix, y)] / mass[prefix] for y in range(3)]) for prefix in self.prefixes]
        )
        # V(s) is the sum over continuations, which is the mass behind s divided by what the prefix itself weighs
        score = (self.rho * self.reward_S_V + (self.ref_S_V.log() if relative else 0)).exp()
        whole = self.answer_scores(score).sum()
        values = []
        for prefix in self.prefixes:
            own = math.prod(score[self.prefixes.index(prefix[:t]), y].item() for t, y in enumerate(prefix))
            values.append(math.log(mass[prefix] * whole / own))
        return policy, torch.tensor(values, dtype=torch.float64)

    def answer_scores(self, score_S_V: Tensor) -> Tensor:
        return torch.where(self.mask_R_T, self.along(score_S_V), 1.0).prod(dim=1)

    def answers(self) -> list[tuple[int, ...]]:
        return [tuple(t[m].tolist()) for t, m in zip(self.tokens_R_T, self.mask_R_T, strict=True)]

    def passing(self, prefix: tuple[int, ...]) -> list[int]:
        return [i for i, answer in enumerate(self.answers()) if answer[: len(prefix)] == prefix]

    def loss(self, policy_S_V: Tensor, log_value_S: Tensor, *, relative: bool, anchor: bool, weight: float) -> Tensor:
        values = torch.cat([log_value_S[self.states_R_T], log_value_S.new_full((len(self.states_R_T), 1), 7.0)], dim=1)
        if anchor:
            values = anchored(values, self.mask_R_T)
        flow = log_flow(
            self.along(policy_S_V).log(),
            self.along(self.reward_S_V),
            values,
            self.mask_R_T,
            rho=self.rho,
            ref_logprobs_B_T=self.along(self.ref_S_V).log() if relative else None,
        )
        return subtb(flow, state_mask(self.mask_R_T), weight).mean()


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
@pytest.mark.parametrize("weight", [1.0, 0.8])
def test_loss_is_zero_at_the_optimum_and_only_there(relative: bool, weight: float):
    """Anchored, the loss vanishes at pi_ref exp(rho sum r); minimised from anywhere it arrives at that policy."""
    world = World.make(0)
    policy, log_value = world.optimum(relative)
    torch.testing.assert_close(world.answer_scores(policy), world.target_R(relative))
    assert world.loss(policy, log_value, relative=relative, anchor=True, weight=weight).item() < 1e-24
    assert world.loss(world.ref_S_V, log_value, relative=relative, anchor=True, weight=weight).item() > 0.1

    logits, values = torch.zeros_like(policy).requires_grad_(), torch.zeros_like(log_value).requires_grad_()
    search = torch.optim.LBFGS([logits, values], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def descend() -> Tensor:
        search.zero_grad()
        loss = world.loss(logits.softmax(dim=1), values, relative=relative, anchor=True, weight=weight)
        loss.backward()
        return loss

    search.step(descend)
    torch.testing.assert_close(logits.softmax(dim=1), policy, rtol=0, atol=1e-4)
    torch.testing.assert_close(values, log_value, rtol=0, atol=1e-3)


def test_answers_drawn_from_the_optimum_are_distributed_as_the_reward_says(chi_square_p):
    world = World.make(1)
    policy, _ = world.optimum(relative=True)
    guidance = Guidance(alpha=0.0, betas={"doctor": 1.0})
    generator = torch.Generator().manual_seed(0)
    children = torch.tensor(
        [[world.prefixes.index((*p, y)) if y < 2 and len(p) < 3 else -1 for y in range(3)] for p in world.prefixes]
    )
    rows = 20_000
    state, code = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    for _ in range(4):
        going = state >= 0
        table = product(world.ref_S_V.log()[state], {"doctor": policy.log()[state]}, guidance)
        token = draw(table, Sampling(), torch.randint(2**63 - 1, (rows,), generator=generator))
        code = torch.where(going, code * 4 + token + 1, code)
        state = torch.where(going, children[state, token], state)
    assert (state < 0).all()
    codes = [sum((y + 1) * 4 ** (len(a) - 1 - t) for t, y in enumerate(a)) for a in world.answers()]
    counts = torch.stack([(code == c).sum() for c in codes])
    assert counts.sum() == rows
    assert chi_square_p(counts, world.target_R(relative=True)) > 0.01
    assert chi_square_p(counts, world.answer_scores(world.ref_S_V)) < 1e-6


def test_without_the_anchor_any_policy_has_a_value_that_leaves_no_loss():
    """log V(s_t) = c + sum log(pi / ref) - rho sum r makes every f equal: then nothing but L_value holds the reward."""
    world = World.make(2)
    generator = torch.Generator().manual_seed(0)
    policy = torch.rand(world.ref_S_V.shape, generator=generator, dtype=torch.float64).softmax(dim=1)
    ratio, reward = (policy / world.ref_S_V).log(), world.reward_S_V
    mask = world.mask_R_T
    steps = (world.along(ratio) - world.rho * world.along(reward)) * mask
    values = 5 + torch.nn.functional.pad(steps.cumsum(dim=1), (1, 0))
    known = {"rho": world.rho, "ref_logprobs_B_T": world.along(world.ref_S_V).log()}
    free = log_flow(world.along(policy).log(), world.along(reward), values, mask, **known)
    held = log_flow(world.along(policy).log(), world.along(reward), anchored(values, mask), mask, **known)
    assert subtb(free, state_mask(mask)).max() < 1e-24
    assert subtb(held, state_mask(mask)).min() > 1e-3
