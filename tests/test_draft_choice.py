"""Drafts that do not pay cost next to nothing, and those that would are found out about."""

import random

import mlx.core as mx
import pytest
from test_drafts import CODE, Planted, decode, same

from glm_fused import Engine, EngineOptions
from glm_fused.generation.decoding import Decoding, Drafting
from glm_fused.generation.drafts.depth import AGAIN, Depth
from glm_fused.generation.drafts.drafter import MATCHES, Kind, course
from glm_fused.generation.drafts.experience import Cost, Costs, Experience, Purse
from glm_fused.generation.drafts.lookup import LookupDrafter
from glm_fused.generation.drafts.mtp import MtpDrafter
from glm_fused.generation.drafts.options import DraftOptions
from glm_fused.generation.limits import LOOKUP, MIXED, MTP
from glm_fused.models import decode_step
from glm_fused.models.prompt_memory import chunk_bytes

TOKENS = 120


@pytest.fixture(scope="module")
def engine():
    with Engine("demo", EngineOptions(draft="auto")) as engine:
        yield engine


def experienced(costs, sources=(LOOKUP, MTP)):
    """An experience of steps that cost so much, whose purse is empty for some hundred tokens."""
    experience = Experience()
    experience.add_plain(1.0)
    for source in sources:
        for depth, cost in enumerate(costs[1:], 1):
            for _ in range(4):
                experience.costs(source).add(depth, cost)
    experience.purse.spend(100.0)
    return experience


class Counted:
    """Calls of functions while a text is decoded."""

    def __init__(self, monkeypatch, model):
        self.counts = {"steps": 0, "drafted": 0, "layer": 0, "recorded": 0}
        for owner, name, what in (
            (Decoding, "_launch", "steps"),
            (Decoding, "_drafted", "drafted"),
            (type(model), "draft", "layer"),
            (decode_step, "record", "recorded"),
        ):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name), what))

    def _counting(self, function, what):
        def counting(*args, **kwargs):
            self.counts[what] += 1
            return function(*args, **kwargs)

        return counting


def counted(monkeypatch, engine, experience):
    """A text, and what was called for it but for the prompt's chunks."""
    model, prompt = engine.model, engine.encode(CODE, raw=True)
    options = DraftOptions("auto", MIXED)
    drafting = Drafting(options.drafter(model), options.chooser(model, experience))
    with monkeypatch.context() as patches:
        found = Counted(patches, model)
        text = decode(model, prompt, drafting, tokens=TOKENS)
    chunks = -(-(len(prompt) - 1) // 16)
    return text, found.counts | {"layer": found.counts["layer"] - chunks}


def test_where_drafts_do_not_pay_all_steps_are_plain_ones(engine, monkeypatch):
    """One a token, each on its way before it is asked for; the layer has nothing to do."""
    plain = decode(engine.model, engine.encode(CODE, raw=True), tokens=TOKENS)
    dear = [1 + 1.5 * depth for depth in range(9)]
    counted(monkeypatch, engine, experienced(dear))  # records the step of a prompt's chunk
    text, counts = counted(monkeypatch, engine, experienced(dear))
    assert same(text, plain)
    assert counts == {"steps": TOKENS, "drafted": 0, "layer": 0, "recorded": 0}


def test_where_drafts_pay_there_are_some(engine, monkeypatch):
    """What the test above would see."""
    plain = decode(engine.model, engine.encode(CODE, raw=True), tokens=TOKENS)
    cheap = experienced([1 + 0.01 * depth for depth in range(9)])
    text, counts = counted(monkeypatch, engine, cheap)
    assert same(text, plain)
    assert counts["steps"] < TOKENS
    assert counts["drafted"] > 2
    assert counts["layer"] > 0


def lost(experience, cost, tokens, text=300):
    """The plain steps that drafts which never stay take besides, in each of several texts."""
    losses = []
    for _ in range(tokens // text):
        depth, done, loss = Depth("auto", experience=experience), 0, 0.0
        while done < text:
            plan = depth.next([Kind(MTP)], text - done - 1)
            if plan is None:
                depth.count_plain(1.0)
            else:
                seconds = cost * (1 + plan.depth)
                depth.count(plan, 0, seconds)
                loss += seconds - 1
            done += 1
        losses.append(loss)
    return losses


@pytest.mark.parametrize("cost", [0.6, 0.95, 1.5, 6.0])
def test_little_is_spent_on_texts_that_do_not_suit(cost):
    """Of a text after the first ones, which teach what drafts cost, and of many."""
    losses = lost(Experience(), cost, 12000)
    assert max(losses[4:]) < 0.03 * 300
    assert sum(losses[4:]) < 0.02 * 300 * len(losses[4:])
    assert sum(losses) > 0


def test_without_a_purse_more_would_be_spent(monkeypatch):
    monkeypatch.setattr(Purse, "spend", lambda self, cost: None)
    assert sum(lost(Experience(), 0.95, 12000)) > 0.03 * 12000


def planned(rests, tokens=600):
    """The plans of a text where sometimes drafts pay, and how often they were thought about."""
    costs = [1, 1.3, 1.5, 1.7, 1.9, 2.1, 2.3, 2.5, 2.7]
    draw, plans, lacking = random.Random(0), [], 1
    depth = Depth("auto", experience=experienced(costs))
    thoughts, depth._cost = [], lambda *given: thoughts.append(given) or Depth._cost(depth, *given)
    for _ in range(tokens):
        kinds = [Kind(LOOKUP, 4)] * (draw.random() < 0.05) + [Kind(MTP)]
        if not rests:
            depth._rest = 0
        plan = depth.next(kinds, 8, lambda _, rows=lacking: rows)
        plans.append(plan)
        lacking = 1 if plan is not None and plan.kind.source == MTP else lacking + 1
        if plan is None:
            depth.count_plain(1.0)
        else:
            depth.count(plan, draw.choice((0, 0, plan.depth)), costs[plan.depth])
    return plans, len(thoughts)


def test_what_cannot_be_afforded_is_not_thought_about_again():
    """Until it could be; the plans are the same."""
    (plans, thoughts), (all_plans, all_thoughts) = planned(True), planned(False)
    assert plans == all_plans
    assert {plan is None for plan in plans} == {True, False}
    assert 2 * thoughts < all_thoughts


def test_look_up_is_judged_before_there_is_a_draft():
    """By what it would have guessed: a text that repeats itself has drafts at once."""
    for stays in (False, True):
        depth = Depth("auto", experience=experienced([1, 1.8, 2.3, 2.6, 3.2, 3.8, 4.2, 4.8, 5.4]))
        for _ in range(AGAIN):
            depth.count_plain(1.0)
        for _ in range(20):
            depth.count_unmade(Kind(LOOKUP, 4), stays)
        assert (depth.next([Kind(LOOKUP, 4)], 8) is not None) == stays


@pytest.mark.parametrize("slots", [4, 7])
def test_slots_for_one_token_leave_plain_steps(slots):
    """A token takes 4 experts, so a draft's would have no room beside them."""
    with Engine("demo", EngineOptions(slots=slots, draft="auto")) as engine:
        model, prompt = engine.model, engine.encode(CODE, raw=True)
        found = decode(model, prompt, Drafting.of(DraftOptions("auto", MIXED), model), TOKENS)
        assert same(found, decode(model, prompt, tokens=TOKENS))
    assert found[2].statistics.describe(None)["proposed"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_what_look_up_would_have_guessed(seed):
    text, drafter, right = random.Random(seed).choices(range(3), k=200), LookupDrafter(), 0
    drafter.start(text[:20])
    for token in text[20:]:
        kinds, found = drafter.kinds(), drafter.unmade(token)
        assert [kind for kind, _ in found] == kinds
        for kind, stays in found:
            assert stays == (drafter.propose(kind, 1, None).tolist() == [token])
            right += stays
        drafter.extend([token], None)
    assert 0 < right < 180


def test_the_course_of_a_draft():
    """The more of look-up's tokens have stayed, the more are the same."""
    assert [kind.match for kind in course(Kind(LOOKUP, 2))] == [2, 3, 4, 4, 4, 4, 8, 8]
    assert {kind.match for kind in course(Kind(LOOKUP, MATCHES[-1]))} == {MATCHES[-1]}
    assert [kind.place for kind in course(Kind(MTP))] == list(range(8))


def waiting(engine, count):
    """A drafter whose layer lacks the rows of the last tokens of a text."""
    model, text = engine.model, engine.encode(CODE * 2, raw=True)
    _, hidden = model.states(mx.array([text[:-1]]), model.make_cache())
    drafter, known = MtpDrafter(model), len(text) - count
    drafter.start(text[:known])
    drafter.prime(hidden[:, : known - 1])
    for at in range(known, len(text)):
        drafter.extend([text[at]], hidden[:, at - 1 : at])
    logits, _, _ = model.draft(mx.array([text[1:]]), hidden, model.make_mtp_cache())
    likeliest = mx.argmax(logits[0], axis=-1).tolist()
    guessed = [a == b for a, b in zip(likeliest[:-1], text[2:], strict=True)]
    return drafter, guessed, likeliest[-1]


@pytest.mark.parametrize("count", [17, 18, 40])
def test_a_review_tells_what_would_have_been_guessed(engine, count):
    """And what comes next is guessed as if there had been none."""
    drafter, guessed, following = waiting(engine, count)
    assert drafter.reviewable() == (Kind(MTP), count)
    assert drafter.review() == guessed[-16:]
    assert any(guessed[-16:])
    assert not all(guessed[-16:])
    assert drafter.reviewable() is None
    drafts = drafter.propose(Kind(MTP), 1, lambda logits, _: mx.argmax(logits, -1))
    assert drafts.tolist() == [following]


def test_a_review_with_another_rows_states_is_found(engine, monkeypatch):
    extend = MtpDrafter.extend
    monkeypatch.setattr(MtpDrafter, "extend", lambda self, t, h: extend(self, t, 0 * h))
    drafter, guessed, _ = waiting(engine, 30)
    assert drafter.review() != guessed[-16:]


def test_rows_come_in_powers_of_two(engine, monkeypatch):
    """So few steps are recorded, whatever the number of tokens that were kept."""
    model, draft, lengths = engine.model, type(engine.model).draft, []

    def counting(self, tokens, *args):
        lengths.append(tokens.shape[1])
        return draft(self, tokens, *args)

    for count in range(1, 17):
        drafter, _, following = waiting(engine, count)
        with monkeypatch.context() as patches:
            patches.setattr(type(model), "draft", counting)
            drafts = drafter.propose(Kind(MTP), 1, lambda logits, _: mx.argmax(logits, -1))
        assert drafts.tolist() == [following]
        assert sum(lengths) == count
        assert set(lengths) <= {1, 2, 4, 8, 16}
        lengths.clear()


def test_states_that_wait_are_planned_for(engine, monkeypatch):
    """As many bytes as a drafter holds, one by one and joined, whether or not it will draft."""
    model, prompt = engine.model, engine.encode(CODE, raw=True)
    monkeypatch.setattr(Depth, "next", lambda *args: None)
    monkeypatch.setattr(Depth, "reviews", lambda *args: False)
    drafter = MtpDrafter(model)
    decode(model, prompt, Drafting(drafter, Depth("auto")), tokens=TOKENS)
    held = sum(each.nbytes for each in drafter._hidden)
    assert len(drafter._tokens) == TOKENS
    with Engine("demo") as without:
        plans = [
            [chunk_bytes(each.model.args, 16, context, 2, streamed=True) for context in (0, TOKENS)]
            for each in (without, engine)
        ]
    (plain, plain_more), (drafted, drafted_more) = plans
    assert (drafted_more - drafted) - (plain_more - plain) == 2 * held


def test_a_cost_is_not_what_interrupts_a_step():
    cost = Cost()
    for sample in (50.0, 9.0, 2.0, 30.0, 2.1, 2.0):  # the first prepares the others
        cost.add(sample)
    assert cost.known
    assert cost.value(1.0) == 2.1


def test_costs_between_those_that_are_known():
    costs = Costs()
    assert costs.table[1] < costs.table[8] < 4
    for _ in range(4):
        costs.add(1, 2.0)
        costs.add(5, 6.0)
    assert (costs.table[1], costs.table[5]) == (2.0, 6.0)
    assert 2.0 < costs.table[2] < costs.table[3] < 4.0
    assert 6.0 > costs.table[8] > 1 + 0.5 * 8


def test_a_text_gets_going_with_what_others_taught(engine):
    """What stays is the text's own, but at first what stayed in those before it."""
    model, prompt = engine.model, engine.encode(CODE, raw=True)
    plain = decode(model, prompt, tokens=TOKENS)
    for right in (0.0, 1.0):
        experience = Experience()
        for _ in range(3):
            planted = Planted(prompt + plain[0], right)
            decode(model, prompt, Drafting(planted, Depth(4, experience=experience)))
        rates = [experience.rate(kind) for kind in course(Kind("planted"))]
        assert (rates[0] > 0.3) == (right == 1.0)
