import random
import re

import pytest

from llmdoctor.profiles import clinic_world as world
from llmdoctor.records import FacePair

QUESTIONS = world.held_out_questions(300)


def test_split_is_disjoint_complete_and_holds_out_the_demo_question():
    train, held_out = world.train_questions(), world.held_out_questions()
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train) > 3000
    assert len(held_out) > 500
    assert world.DEMO_QUESTION == "How can I sleep better?"
    assert world.DEMO_QUESTION in held_out
    assert {world.topic_of(q) for q in held_out} == {world.topic_of(q) for q in train} == set(world.TOPICS)
    assert world.held_out_questions(10) == held_out[:10]


def test_same_seed_same_text():
    one = [world.answer(q, random.Random(7)) for q in QUESTIONS[:20]]
    assert one == [world.answer(q, random.Random(7)) for q in QUESTIONS[:20]]
    assert list(world.conversations(20, seed=3)) == list(world.conversations(20, seed=3))
    assert list(world.conversations(20, seed=3)) != list(world.conversations(20, seed=4))


def test_every_sentence_is_unique_clean_and_one_sentence():
    drawn = [
        text
        for topic in world.TOPICS.values()
        for templates in topic.templates.values()
        for template in templates
        for text in template.expand()
    ]
    assert len(set(drawn)) == len(drawn) == len(world.sentences())
    for text in drawn:
        assert re.fullmatch(r"[A-Z][A-Za-z,' -]+\.", text), text
        assert "  " not in text
        assert " ," not in text
        assert world.split_sentences(text) == [text]
        assert not re.search(r"\b(\w+) \1\b", text), text
        assert not re.search(r"\b[Aa] ([aeio]|hour|honest)|\b[Aa]n [^aeiouhSM]", text), text


@pytest.mark.parametrize(("axis", "sign"), [("helpful", 1), ("helpful", -1), ("safe", 1), ("safe", -1)])
def test_gold_recovers_the_tags(axis, sign):
    rng = random.Random(1)
    chance = {axis: 1.0 if sign > 0 else 0.0}
    for question in QUESTIONS:
        text = world.answer(question, rng, **chance)
        gold = world.gold(question, text)
        assert getattr(gold, axis) == sign
        assert gold.ungrammatical == 0
        assert 4 <= gold.sentences <= 6
        parts = world.split_sentences(text)
        assert len(set(parts)) == len(parts)


def test_default_answers_are_good_half_of_the_time():
    rng = random.Random(2)
    golds = [world.gold(q, world.answer(q, rng)) for q in QUESTIONS]
    assert abs(sum(g.helpful for g in golds)) / len(golds) < 0.12
    assert abs(sum(g.safe for g in golds)) / len(golds) < 0.12


def test_length_is_no_signal():
    """The mean length of helpful and unhelpful (safe and unsafe) sentences differs by a few percent only."""

    def mean_length(axis, sign):
        lengths = []
        for topic in world.TOPICS.values():
            for template in topic.templates[axis, sign]:
                texts = [len(text) for text in template.expand()]
                lengths.append(sum(texts) / len(texts))
        return sum(lengths) / len(lengths)

    for axis in ("helpful", "safe"):
        assert mean_length(axis, 1) == pytest.approx(mean_length(axis, -1), rel=0.06)


def test_gold_counts_strangers_and_fragments_as_ungrammatical():
    question = world.DEMO_QUESTION
    text = world.answer(question, random.Random(0), helpful=1.0, safe=1.0)
    assert world.gold(question, "Colourless green ideas sleep furiously.") == world.Gold(0.0, 0.0, 1, 1)
    assert world.gold(question, "") == world.Gold(0.0, 0.0, 0, 0)
    cut = world.gold(question, text + " Keep your bed")
    whole = world.gold(question, text)
    assert (cut.helpful, cut.safe) == (whole.helpful, whole.safe) == (1.0, 1.0)
    assert cut.sentences == whole.sentences + 1
    assert cut.ungrammatical == 1
    assert world.gold(question, text[:-1]).ungrammatical == 1


def test_sentences_of_another_topic_count_nothing():
    """One helpful sentence of the topic and one of another: (1 + 0) / 2."""

    def helpful(name):
        return next(world.TOPICS[name].templates["helpful", 1][0].expand())

    assert world.gold(world.DEMO_QUESTION, helpful("sleep") + " " + helpful("rice")).helpful == 0.5
    assert world.gold(world.DEMO_QUESTION, helpful("rice")) == world.Gold(0.0, 0.0, 1, 0)


def test_topics_are_found_in_the_users_own_words():
    assert world.topic_of("Any ideas for baking bread with rye?") == "bread"
    assert world.topic_of("my PUPPY chews everything") == "puppy"
    assert world.topic_of("What is the capital of France?") is None
    text = world.answer(world.DEMO_QUESTION, random.Random(0), helpful=1.0)
    assert world.gold("What is the capital of France?", text).helpful == 0


def test_conversations_follow_their_system_prompt():
    conversations = list(world.conversations(4000, seed=1))
    without = [c for c in conversations if c[0]["role"] == "user"]
    assert 0.42 < len(without) / 4000 < 0.48
    assert 0.15 < sum(len(c) > 3 for c in conversations) / 4000 < 0.25
    held_out = set(world.held_out_questions())
    for conversation in conversations:
        turns = [m for m in conversation if m["role"] != "system"]
        assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert turns[0]["content"] not in held_out

    def mean(prompt, axis):
        found = [c for c in conversations if c[0]["content"] == prompt]
        assert len(found) > 20
        scores = [getattr(world.gold(c[1]["content"], c[2]["content"]), axis) for c in found]
        return sum(scores) / len(scores)

    for axis, other in (("helpful", "safe"), ("safe", "helpful")):
        face = world.FACES[axis]
        assert isinstance(face, FacePair)
        assert mean(face.positive, axis) > 0.8
        assert mean(face.negative, axis) < -0.8
        assert abs(mean(face.positive, other)) < 0.25
    assert not re.search("brief|short|concise", world.FACES["helpful"].negative)
