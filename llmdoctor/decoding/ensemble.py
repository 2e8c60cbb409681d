"""The models of a batch, moved together: the patient, the doctors and, in mode "ratio", the doctors' bases."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmdoctor.decoding.caches import KVCache, Read, close_holes, open_cache, tokens_last
from llmdoctor.decoding.prefix import Prefix, PrefixCache
from llmdoctor.decoding.round import Round, draw_rows, products
from llmdoctor.models import Patient
from llmdoctor.settings import Guidance, Sampling
from llmdoctor.training.folder import LoadedDoctor

# Tokens. A draft model that has more to read waits until it drafts, and then begins again.
_FAR_BEHIND = 64


class Ensemble:
    """Every model with its KV cache over the same rows.

    All caches give a token the same slot, so one mask serves them all. Between two rounds the doctors have read every
    token of every row, the patient and the bases all but the last, ``pending``: they read it with the next draft.
    A draft model, whose opinion counts only when it drafts, may be further behind (`catch_up`).

    A doctor that is a head on the patient's own states (`llmdoctor.training.folder.HeadAdapter`) has no cache of its
    own: what it says comes out of the patient's forward, and so it knows the pending token only with the next draft.

    ``draft_model`` is a model with no say, which drafts in place of a doctor. One that has the patient's embeddings was
    made of it, so that the heads read its states as they read the patient's. ``prefixes`` are what is known of each
    prompt already, less than the whole of it.
    """

    def __init__(
        self,
        patient: Patient,
        doctors: Mapping[str, LoadedDoctor],
        prompts: Sequence[Sequence[int]],
        *,
        draft_model: PreTrainedModel | None = None,
        with_bases: bool = False,
        prefix_cache: PrefixCache | None = None,
        prefixes: Sequence[Prefix | None] = (),
    ) -> None:
        self._vocabulary, self._device = patient.vocabulary, patient.model.device
        self._doctors = doctors
        # By role, not by name: a doctor may be called "patient", and a model may have two roles.
        models = {"patient": patient.model}
        on_patient = (name for name, doctor in doctors.items() if doctor.head and doctor.model is patient.model)
        self._on_patient = tuple(on_patient)
        models |= {f"doctor {name}": doctors[name].model for name in doctors if name not in self._on_patient}
        readers = [role for role in models if role != "patient"]
        self._drafts_with_heads = False
        if draft_model is not None:
            models["draft"] = draft_model
            here, there = (_embeddings(model) for model in (draft_model, patient.model))
            self._drafts_with_heads = here is there or here.data_ptr() == there.data_ptr()
        self._names = {f"doctor {name}": name for name in doctors}  # by role
        self._base_of: dict[str, str] = {}  # doctor -> role of its base; one that several doctors share is read once
        if with_bases:
            for name, doctor in doctors.items():
                assert doctor.base is not None
                if doctor.base is patient.model:
                    self._base_of[name] = "patient"
                    continue
                held = (role for role, model in models.items() if role.startswith("base ") and model is doctor.base)
                self._base_of[name] = next(held, f"base {name}")
                models[self._base_of[name]] = doctor.base
        if prefix_cache is None:
            caches = {role: open_cache(model) for role, model in models.items()}
        else:
            caches = prefix_cache.begin(list(prompts[0]), models)
        self._caches = caches
        self._patient = caches["patient"]
        self._readers = {role: caches[role] for role in readers}  # those that read every token at once
        self._ids_B_L = torch.zeros(len(prompts), 0, dtype=torch.long, device=self._device)  # for the draft model
        self._bases = {role: cache for role, cache in caches.items() if role.startswith("base ")}
        self._filled = [len(prompt) for prompt in prompts]  # slots of each row that hold a token
        longest = max(self._filled)
        ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        if any(prefixes):
            self._load(prompts, prefixes)
        self._pending_B_T = torch.tensor(ids, device=self._device)  # the whole prompt, until `prefill`
        self._mask_B_L: Tensor | None = None  # None while every slot of every row holds a token
        if min(self._filled) < longest:
            lengths_B_1 = torch.tensor(self._filled, device=self._device)[:, None]
            self._mask_B_L = (torch.arange(longest, device=self._device) >= longest - lengths_B_1).long()
        self._next_B_1_V: dict[str, Tensor] = {}  # what the readers say of the token after the last, by role

    def _load(self, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None]) -> None:
        """Fill the caches with what is known. Rows end together, so each reads as much as the one that knows least."""
        some = next(prefix for prefix in prefixes if prefix)
        known = [(prompt, prefix or some.first(0)) for prompt, prefix in zip(prompts, prefixes, strict=True)]
        fresh = max(len(prompt) - prefix.length for prompt, prefix in known)
        cut = [prefix.first(max(0, len(prompt) - fresh)) for prompt, prefix in known]
        if length := max(map(len, prompts)) - fresh:
            for role, cache in self._caches.items():
                if all(role in prefix.layers for prefix in cut):  # the draft model may have been behind
                    cache.load([prefix.layers[role] for prefix in cut], length)

    @torch.inference_mode()
    def prefix(self, row: int, drafted: int = 0) -> Prefix | None:
        """What the models have read of a row, its last ``drafted`` slots aside; None where their caches have no slots.

        Also in the middle of its prompt. Without the draft model where it has not read as much.
        """
        held = self._patient.length - drafted
        reached = {role: cache for role, cache in self._caches.items() if cache.length >= held}
        if not all(cache.can_have_holes for cache in reached.values()):
            return None
        if self._mask_B_L is not None:
            slots_L = self._mask_B_L[row, :held].nonzero()[:, 0]
        else:
            slots_L = torch.arange(held)
        return Prefix(len(slots_L), {role: cache.saved(row, slots_L) for role, cache in reached.items()})

    @property
    def unread(self) -> int:
        """How many tokens of the prompts, padding included, are yet to be read by `prefill`."""
        return (self._pending_B_T.shape[1] - self._patient.length) * len(self._filled)

    @property
    def slots(self) -> int:
        """The slots that the next round reads, the pending token's included."""
        return self._patient.length + 1

    @property
    def knows_late(self) -> bool:
        """Whether a doctor knows log V after the pending token only with the next `propose`."""
        return bool(self._on_patient)

    def drop_draft_model(self) -> None:
        """Go on without the draft model."""
        self._caches.pop("draft", None)

    @property
    def _reading(self) -> dict[str, KVCache]:
        """The caches of the models that read the prompts at once: a draft model waits until it is to draft."""
        return {role: cache for role, cache in self._caches.items() if role != "draft"}

    @property
    def has_draft_model(self) -> bool:
        """Whether a draft model drafts."""
        return "draft" in self._caches

    @property
    def rigid(self) -> str | None:
        """The name of a model whose state cannot take tokens back; None where all can."""
        return next((type(c.model).__name__ for c in self._caches.values() if not c.can_roll_back), None)

    @property
    def can_draft(self) -> bool:
        """Whether a draft can be taken back from the caches of these rows."""
        if not (self._readers or self.has_draft_model) or self.rigid:
            return False
        # rows accept drafts of different length; what some of them reject stays behind as holes
        return len(self._filled) == 1 or all(cache.can_have_holes for cache in self._caches.values())

    @property
    def can_join(self) -> bool:
        """Whether these rows can join others. Known after `prefill`."""
        return all(cache.can_join for cache in self._caches.values())

    def padding(self, other: "Ensemble") -> tuple[int, int]:
        """The empty slots that joining another ensemble would add to the rows of both, and their slots without it."""
        longest = max(self.slots, other.slots)
        needed = sum(len(one._filled) * one.slots for one in (self, other))
        return longest * (len(self._filled) + len(other._filled)) - needed, needed

    @torch.inference_mode()
    def prefill(self, tokens: int | None = None) -> Round | None:
        """Read the prompts: the round of nothing drafted, with the log-probs of every row's first token.

        With ``tokens``, read at most so many of an only row; None where some are left for the next call.
        """
        ids_B_L, mask_B_L = self._pending_B_T, self._mask_B_L
        if tokens is not None and len(self._filled) == 1 and tokens < self.unread:
            until = self._patient.length + tokens
            for cache in self._reading.values():
                cache.feed(ids_B_L[:, cache.length : until])
                cache.take_back(0)  # a window's record of what it has passed
            return None
        if self.has_draft_model:
            self._ids_B_L = ids_B_L
            if self._caches["draft"].length == 0:
                self._start_draft_model()
        reads = {role: cache.feed(ids_B_L[:, cache.length :], mask_B_L) for role, cache in self._reading.items()}
        said = {role: self._log_probs(reads[role].logits_B_K_V) for role in ("patient", *self._bases)}
        doctors = {name: self._opinion(name, reads[self._role(name)])[0] for name in self._doctors}
        bases = {name: said[role] for name, role in self._base_of.items()}
        return Round(ids_B_L[:, :0], said["patient"], doctors, bases)

    @torch.inference_mode()
    def propose(
        self,
        length: int,
        guidances: Sequence[Guidance],
        samplings: Sequence[Sampling],
        keys_B_J: Tensor,
    ) -> tuple[Round, list[dict[str, float]]]:
        """Draft ``length`` tokens for every row with one model, and let all models read them.

        Also returns for each row log V after the pending token, of the doctors that know it only now.
        """
        drafts_B_K = self._pending_B_T[:, :0]
        said = dict(self._next_B_1_V)
        values: dict[str, Tensor] = {}
        mask_B_L = self._mask_B_L
        if length:
            if mask_B_L is not None:
                mask_B_L = torch.nn.functional.pad(mask_B_L, (0, length), value=1)
            by_doctor: dict[str, Read] = {}
            if self.has_draft_model:
                drafts_B_K = self._draft_by_model(length, guidances, samplings, keys_B_J, mask_B_L)
            else:
                # the doctor with the greatest say guesses best what the product will draw
                drafter = max(self._readers, key=lambda role: self._say(role, guidances))
                drafts_B_K, by_doctor[drafter] = self._draft(drafter, length, guidances, samplings, keys_B_J, mask_B_L)
            for role, cache in self._readers.items():
                read = by_doctor[role] if role in by_doctor else cache.feed(drafts_B_K, mask_B_L, length)
                name = self._names[role]
                logprobs_B_K_V, values[name] = self._opinion(name, read)
                said[role] = torch.cat([said[role], logprobs_B_K_V], dim=1)
        ids_B_J = torch.cat([self._pending_B_T, drafts_B_K], dim=1) if length else self._pending_B_T
        if self.has_draft_model:
            self._ids_B_L = torch.cat([self._ids_B_L, ids_B_J], dim=1)
        late = {"patient": self._patient, **self._bases}
        reads = {role: cache.feed(ids_B_J, mask_B_L, length + 1) for role, cache in late.items()}
        said |= {role: self._log_probs(read.logits_B_K_V) for role, read in reads.items()}
        pending: list[dict[str, float]] = [{} for _ in self._filled]
        for name in self._on_patient:
            said[f"doctor {name}"], values_B_J = self._opinion(name, reads["patient"])
            values[name] = values_B_J[:, 1:]
            for own, value in zip(pending, values_B_J[:, 0].tolist(), strict=True):
                own[name] = value
        doctors = {name: said[f"doctor {name}"] for name in self._doctors}
        bases = {name: said[role] for name, role in self._base_of.items()}
        return Round(drafts_B_K, said["patient"], doctors, bases, values), pending

    def _say(self, role: str, guidances: Sequence[Guidance]) -> float:
        return sum(guidance.betas.get(self._names[role], 0.0) for guidance in guidances)

    def _draft(
        self,
        drafter: str,
        length: int,
        guidances: Sequence[Guidance],
        samplings: Sequence[Sampling],
        keys_B_J: Tensor,
        mask_B_L: Tensor | None,
    ) -> tuple[Tensor, Read]:
        """Token ids [B, K] drawn from doctor^(alpha + beta), and what the doctor says after each of them.

        Each draw uses the key of its place, as the draw from the product will. Where patient and doctor
        agree, the product is about doctor^(alpha + beta), and both draws then give the same token.
        """
        cache, logits_B_V = self._readers[drafter], self._next_B_1_V[drafter][:, 0]
        name = self._names[drafter]
        doctor = self._doctors[name]
        powers = [guidance.alpha + guidance.betas.get(name, 0.0) for guidance in guidances]
        powers_B_1 = logits_B_V.new_tensor(powers)[:, None]
        drafts: list[Tensor] = []
        reads: list[Read] = []
        for k in range(length):
            ids_B_1 = draw_rows(powers_B_1 * logits_B_V, samplings, keys_B_J[:, k])[:, None]
            read = cache.feed(ids_B_1, None if mask_B_L is None else mask_B_L[:, : self.slots + k + 1])
            drafts.append(ids_B_1)
            reads.append(read)
            # without the softmax, which changes no draw: it is done for all places at once
            said = doctor.logits(*read)
            logits_B_V = self._vocabulary.mask(said[:, 0].to(self._device)).to(logits_B_V)
        logits, hidden = zip(*reads, strict=True)
        return torch.cat(drafts, dim=1), Read(torch.cat(logits, dim=1), torch.cat(hidden, dim=1))

    def _draft_by_model(
        self,
        length: int,
        guidances: Sequence[Guidance],
        samplings: Sequence[Sampling],
        keys_B_J: Tensor,
        mask_B_L: Tensor | None,
    ) -> Tensor:
        """Token ids [B, K], as `_draft` draws them, by the draft model. It reads the last one only once that stands.

        It guesses the patient, with it all doctors of mode "product" that are models of their own, and of a model
        that was made of the patient the heads, too.
        """
        cache, heads = self._caches["draft"], self._on_patient if self._drafts_with_heads else ()
        guesses: list[Guidance] = []
        for guidance in guidances:
            others = sum(beta for name, beta in guidance.betas.items() if name not in heads)
            alpha = guidance.alpha + (others if guidance.mode == "product" else 0.0)
            guesses.append(guidance if alpha == guidance.alpha else guidance.model_copy(update={"alpha": alpha}))
        fresh_B_T = torch.cat([self._ids_B_L, self._pending_B_T], dim=1)[:, cache.length :]
        drafts: list[Tensor] = []
        for k in range(length):
            fresh = fresh_B_T.shape[1]
            read = cache.feed(fresh_B_T, None if mask_B_L is None else mask_B_L[:, : self.slots + k], fresh)
            read = Read(read.logits_B_K_V[:, -1:], read.hidden_B_K_H[:, -1:])
            said = self._log_probs(read.logits_B_K_V)
            doctors = {name: self._log_probs(self._doctors[name].logits(*read)) for name in heads}
            law = products(Round(fresh_B_T[:, :0], said, doctors, dict.fromkeys(doctors, said)), guesses)
            fresh_B_T = draw_rows(law[:, 0], samplings, keys_B_J[:, k])[:, None]
            drafts.append(fresh_B_T)
        return torch.cat(drafts, dim=1)

    def _start_draft_model(self) -> None:
        """Let it read one token again: that shows what its cache can do."""
        cache = self._caches["draft"]
        cache.rewind(0)
        cache.feed(self._ids_B_L[:, :1], None if self._mask_B_L is None else self._mask_B_L[:, :1])

    def _close_holes_of_draft_model(self, held_B_L: Tensor, kept_B_L: Tensor) -> None:
        """As the other caches: a mask of the slots until now, and those that stay."""
        cache, slots = self._caches["draft"], held_B_L.shape[1]
        ids_B_L, self._ids_B_L = self._ids_B_L, self._ids_B_L.gather(1, kept_B_L)
        if slots - cache.length > _FAR_BEHIND or not cache.can_have_holes:
            self._start_draft_model()
            return
        if cache.length < slots:
            cache.feed(ids_B_L[:, cache.length :], held_B_L)
        cache.pack(kept_B_L)

    @property
    def _behind(self) -> int:
        """How many tokens, the pending one aside, the draft model has not read."""
        return self._patient.length - self._caches["draft"].length if self.has_draft_model else 0

    @torch.inference_mode()
    def catch_up(self) -> None:
        """Let the draft model read all but the pending token, if it is more than one token behind.

        One it reads with the next draft.
        It reads no prompt and nothing in rounds without a draft, and what is left may take longer than a round.
        """
        if self._behind > 1:
            self._catch_up()

    def _catch_up(self) -> None:
        if self._behind:
            cache, held = self._caches["draft"], self._patient.length
            mask_B_L = None if self._mask_B_L is None else self._mask_B_L[:, :held]
            cache.feed(self._ids_B_L[:, cache.length : held], mask_B_L)

    @torch.inference_mode()
    def settle(
        self, round_: Round, staying: Sequence[int], accepted: Sequence[int], last: Sequence[int]
    ) -> list[dict[str, float]]:
        """Keep the ``staying`` rows of a round: their ``accepted`` drafts, and the ``last`` token, which was drawn.

        Takes back what was rejected and lets the readers read the last token: log V after it, by doctor, of each row;
        not of the doctors that know it late.
        """
        # rows that ended need no cache: drop them before the models read another token
        if len(staying) < len(self._filled):
            self.keep(staying)
        # What all rows reject is cut off. What only some of them reject stays in their rows as empty slots, holes.
        rejected = [round_.length - count for count in accepted]
        common = min(rejected)
        kept = self._patient.length - common
        for cache in self._caches.values():
            cache.take_back(max(0, cache.length - kept))
        fresh = round_.length - common
        # without holes and padding no mask is needed, and without one attention is faster
        if self._mask_B_L is not None or max(rejected) > common:
            mask_B_L = self._mask_B_L
            if mask_B_L is None:
                mask_B_L = torch.ones(len(last), self._patient.length - fresh, dtype=torch.long, device=self._device)
            holds = [[int(slot < count) for slot in range(fresh)] + [1] for count in accepted]
            self._mask_B_L = torch.cat([mask_B_L, mask_B_L.new_tensor(holds)], dim=1)
        if self.has_draft_model:
            self._ids_B_L = self._ids_B_L[:, :kept]
        self._filled = [filled + count for filled, count in zip(self._filled, accepted, strict=True)]
        if self._mask_B_L is not None:
            # it holds the pending token already, which the caches do not
            held_B_L, last_B_1 = self._mask_B_L[:, :-1], self._mask_B_L[:, -1:]
            closed_B_L = close_holes(self._reading.values(), held_B_L, max(self._filled))
            self._mask_B_L = torch.cat([closed_B_L, last_B_1], dim=1)
            if self.has_draft_model and closed_B_L is not held_B_L:
                self._close_holes_of_draft_model(held_B_L, tokens_last(held_B_L, max(self._filled)))
        self._filled = [filled + 1 for filled in self._filled]
        self._pending_B_T = torch.tensor(last, device=self._device)[:, None]
        values: dict[str, list[float]] = {}
        for role, cache in self._readers.items():
            read = cache.feed(self._pending_B_T, self._mask_B_L)
            name = self._names[role]
            self._next_B_1_V[role], values_B_1 = self._opinion(name, read)
            values[name] = values_B_1[:, 0].tolist()
        return [{name: column[row] for name, column in values.items()} for row in range(len(last))]

    @torch.inference_mode()
    def keep(self, staying: Sequence[int]) -> None:
        """Drop all other rows."""
        rows_B = torch.tensor(staying, device=self._device)
        for cache in self._caches.values():
            cache.keep(rows_B)
        self._filled = [self._filled[row] for row in staying]
        self._pending_B_T = self._pending_B_T[rows_B]
        if self.has_draft_model:
            self._ids_B_L = self._ids_B_L[rows_B]
        self._mask_B_L = None if self._mask_B_L is None else self._mask_B_L[rows_B]
        self._next_B_1_V = {role: logprobs[rows_B] for role, logprobs in self._next_B_1_V.items()}

    @torch.inference_mode()
    def join(self, other: "Ensemble") -> None:
        """Add the rows of another ensemble of the same models, both between two rounds. ``other`` is then of no use."""
        if self.has_draft_model != other.has_draft_model:
            self.drop_draft_model()
            other.drop_draft_model()
        again = max(self._behind, other._behind) > _FAR_BEHIND
        if not again:
            self._catch_up()
            other._catch_up()
        # taken before the caches grow, for an unwritten mask is as long as they are
        masks = [own._mask() for own in (self, other)]
        for role, cache in (self._reading if again else self._caches).items():
            cache.join(other._caches[role])
        slots = self.slots
        padded = [torch.nn.functional.pad(mask_B_L, (slots - mask_B_L.shape[1], 0)) for mask_B_L in masks]
        joined = torch.cat(padded)
        self._mask_B_L = None if bool(joined.all()) else joined
        self._filled += other._filled
        self._pending_B_T = torch.cat([self._pending_B_T, other._pending_B_T])
        if self.has_draft_model:
            ids = [own._ids_B_L for own in (self, other)]
            self._ids_B_L = torch.cat([torch.nn.functional.pad(one, (slots - 1 - one.shape[1], 0)) for one in ids])
            if again:
                self._start_draft_model()
        self._next_B_1_V = {
            role: torch.cat([logprobs, other._next_B_1_V[role]]) for role, logprobs in self._next_B_1_V.items()
        }

    def _mask(self) -> Tensor:
        """The mask [B, slots], also where it is nothing but ones."""
        if self._mask_B_L is not None:
            return self._mask_B_L
        return torch.ones(len(self._filled), self.slots, dtype=torch.long, device=self._device)

    def _opinion(self, name: str, read: Read) -> tuple[Tensor, Tensor]:
        """A doctor's log-probs [B, K, V] and log V [B, K]."""
        doctor = self._doctors[name]
        return self._log_probs(doctor.logits(*read)), doctor.log_value(read.hidden_B_K_H).to(self._device)

    def _role(self, name: str) -> str:
        """The role of the model that a doctor's opinion is read from."""
        return "patient" if name in self._on_patient else f"doctor {name}"

    def _log_probs(self, logits_B_K_V: Tensor) -> Tensor:
        return self._vocabulary.mask(logits_B_K_V.to(self._device)).log_softmax(dim=-1)


def _embeddings(model: PreTrainedModel) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight
