"""Stage 3's entry: a fixed list of prompts, decoded together to their ends."""

from collections.abc import Iterator, Mapping, Sequence

from transformers import PreTrainedModel

from llmdoctor.decoding.batch import Batch
from llmdoctor.decoding.drafting import Drafting
from llmdoctor.decoding.prefix import PrefixCache
from llmdoctor.decoding.rows import ReadGuidance, Request, Step
from llmdoctor.errors import UsageError
from llmdoctor.models import Patient
from llmdoctor.settings import Sampling
from llmdoctor.training.folder import LoadedDoctor


def decode(
    patient: Patient,
    doctors: Mapping[str, LoadedDoctor],
    prompts: Sequence[Sequence[int]],
    guidance: ReadGuidance | Sequence[ReadGuidance],
    sampling: Sampling | Sequence[Sampling],
    *,
    seed: int | Sequence[int],
    top: int = 0,
    follow: bool = False,
    drafting: Drafting | None = None,
    draft_model: PreTrainedModel | None = None,
    prefix_cache: PrefixCache | None = None,
    first: int | None = None,
    begun: int = 0,
) -> Iterator[Step]:
    """Decode all ``prompts`` (token ids) together and yield their tokens as they are drawn, row after row.

    ``guidance`` and ``sampling`` are one for all rows or one for each; guidance is a function, called again for every
    token. Row i draws from a generator of its own, seeded with ``seed`` + i or ``seed[i]``, so a prompt's answer does
    not depend on its neighbours.

    ``drafting`` lets a doctor, or ``draft_model``, draft ahead; without it every token costs one forward of every
    model. Both ways draw the same tokens from the same seed, up to the rounding of the models' own arithmetic. Where
    drafts cannot be taken back (recurrent states, with a warning; a batch over a sliding window) the plain path is
    used. ``top`` and ``follow`` are those of `Batch`. ``prefix_cache`` keeps the caches of a single prompt for the next
    one. ``first`` is the first token instead of a draw. The last ``begun`` tokens of every prompt are the beginning of
    its answer.

    Raises UsageError for guidance that names no doctor or lacks its bases, for a prompt that is empty or fills the
    context, and for lists of another length than ``prompts``. While it runs: UsageError when guidance becomes wrong,
    LoadError for a model without a KV cache and for log-probs that are not numbers.
    """
    count = len(prompts)
    reads = [guidance] * count if callable(guidance) else list(guidance)
    samplings = [sampling] * count if isinstance(sampling, Sampling) else list(sampling)
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if not len(reads) == len(samplings) == len(seeds) == count:
        raise UsageError(f"expected one guidance, one sampling and one seed for each of {count} prompts")
    if prefix_cache is not None and count != 1:
        raise UsageError(f"a prefix cache holds one conversation; got {count} prompts")
    batch = Batch(
        patient,
        doctors,
        top=top,
        follow=follow,
        drafting=drafting,
        draft_model=draft_model,
        with_bases=any(read().mode == "ratio" for read in dict.fromkeys(reads)),
        prefix_cache=prefix_cache,
    )
    batch.join([Request(*request, first, begun) for request in zip(prompts, reads, samplings, seeds, strict=True)])
    return _rounds(batch)


def _rounds(batch: Batch) -> Iterator[Step]:
    while batch:
        yield from batch.round()
