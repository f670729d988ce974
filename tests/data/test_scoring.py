"""Metrics of answers against brute force on random logits."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torchmetrics.text import Perplexity as ReferencePerplexity

from laser_callback.data.row_scores import AnswerScores, Role, score_rows
from laser_callback.data.scoring import METRICS, Perplexity, target_nll, windows_of

VOCAB = 40


def random_batch(seed, facts=23, dtype=torch.float32, paraphrases=True, neighbours=True):
    """Chunks of (logits, targets, target_mask) in random row order, as a collator could give them, and their batch."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (), generator=g))  # noqa: E731
    rows = []
    for fact in range(facts):
        n_paraphrases, n_choices = draw(4) * paraphrases, draw(2) * (1 + draw(3))
        gold = torch.randint(VOCAB, (1 + draw(3),), generator=g)
        roles = [Role.PROMPT] + [Role.PARAPHRASE] * n_paraphrases + [Role.CHOICE] * n_choices
        roles += [Role.NEIGHBOUR] * draw(3) * neighbours
        for role in roles:
            target = torch.randint(VOCAB, (1 + draw(3),), generator=g) if role >= Role.CHOICE else gold
            logits = torch.randn(len(target), VOCAB, generator=g)
            logits[torch.arange(len(target)), target] += 2
            rows.append((fact, role, (logits * 2).round(decimals=1).to(dtype), target))  # rounded: ties occur
    rows = [rows[i] for i in torch.randperm(len(rows), generator=g)]
    chunks = []
    for i in range(0, len(rows), 10):
        part = rows[i : i + 10]
        width = max(len(row[3]) for row in part)
        targets, mask = torch.zeros(len(part), width, dtype=torch.long), torch.zeros(len(part), width, dtype=torch.bool)
        for r, (_, _, _, target) in enumerate(part):
            targets[r, : len(target)], mask[r, : len(target)] = target, True
        chunks.append((torch.cat([row[2] for row in part]), targets, mask))
    fact_index, roles = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    return rows, chunks, {"row_fact": fact_index, "row_role": roles, "id": [str(i) for i in range(facts)]}


def scored(chunks, batch):
    return AnswerScores.gather([score_rows(*chunk) for chunk in chunks], batch)


def brute_force(rows, facts):
    """name -> list per fact of the units' values, in plain Python and float64."""
    out = {name: [[] for _ in range(facts)] for name in METRICS}
    for fact in range(facts):
        mine = [row for row in rows if row[0] == fact]

        def measure(row):
            logits, target = row[2].double().tolist(), row[3].tolist()
            ranks = [sum(x >= line[t] for x in line) - 1 for line, t in zip(logits, target, strict=True)]
            nll = [math.log(sum(map(math.exp, line))) - line[t] for line, t in zip(logits, target, strict=True)]
            others = [x for token, x in enumerate(logits[0]) if token != target[0]]
            soft_error = 1 / (1 + math.exp((logits[0][target[0]] - max(others)) / 2))
            return ranks, sum(nll) / len(nll), logits[0].index(max(logits[0])), sum(nll), soft_error

        (prompt,) = [measure(row) for row in mine if row[1] == Role.PROMPT]
        prompts = [measure(row) for row in mine if row[1] in (Role.PROMPT, Role.PARAPHRASE)]
        choices = [measure(row) for row in mine if row[1] == Role.CHOICE]
        neighbours = [measure(row) for row in mine if row[1] == Role.NEIGHBOUR]
        right = [ranks[0] == 0 for ranks, *_ in prompts]
        out["first_token_accuracy"][fact] = [prompt[0][0] == 0]
        out["answer_accuracy"][fact] = [not any(prompt[0])]
        out["top5_accuracy"][fact] = [prompt[0][0] < 5]
        out["top10_accuracy"][fact] = [prompt[0][0] < 10]
        out["log_loss"][fact] = [prompt[1]]
        out["soft_error"][fact] = [prompt[4] for prompt in prompts]
        out["choice_accuracy"][fact] = [all(prompt[1] < choice[1] for choice in choices)] if choices else []
        out["summed_choice_accuracy"][fact] = [all(prompt[3] < choice[3] for choice in choices)] if choices else []
        out["paraphrase_accuracy"][fact] = right
        out["paraphrase_robustness"][fact] = [all(right)] if len(right) > 1 else []
        out["paraphrase_consistency"][fact] = [a[2] == b[2] for a, b in combinations(prompts, 2)]
        out["neighbour_accuracy"][fact] = [ranks[0] == 0 for ranks, *_ in neighbours]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_metric_equals_brute_force(dtype):
    rows, chunks, batch = random_batch(0, dtype=dtype)
    scores = scored(chunks, batch)
    for name, by_fact in brute_force(rows, len(batch["id"])).items():
        metric = METRICS[name]()
        metric.update(scores)
        units = [float(value) for values in by_fact for value in values]
        # float32 arithmetic whatever the dtype of the logits, so one tolerance serves all; counts are exact
        tolerance = {"rel": 1e-6} if name in ("log_loss", "soft_error") else {"rel": 0, "abs": 1e-15}
        assert metric.compute().item() == pytest.approx(sum(units) / len(units), **tolerance), name
        expected = [sum(values) / len(values) if values else math.nan for values in by_fact]
        assert metric.per_fact(scores).tolist() == pytest.approx(expected, nan_ok=True, rel=1e-6), name
        assert len(set(units)) > 1, f"{name}: the data do not test anything"


def test_soft_errors_have_the_derivative_of_their_formula():
    # Two rows: right by 1, and wrong by 3; the second row's answer has two tokens, of which the first counts.
    logits = torch.tensor([[0.0, 2.0, 1.0], [4.0, 1.0, 0.0], [0.0, 0.0, 9.0]], requires_grad=True)
    targets, mask = torch.tensor([[1, 0], [1, 2]]), torch.tensor([[True, False], [True, True]])
    soft = score_rows(logits, targets, mask).soft_error
    expected = [1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-1.5))]
    assert soft.tolist() == pytest.approx(expected)
    soft.sum().backward()
    slopes = [p * (1 - p) / 2 for p in expected]
    wanted = [[0, -slopes[0], slopes[0]], [slopes[1], -slopes[1], 0], [0, 0, 0]]
    torch.testing.assert_close(logits.grad, torch.tensor(wanted))


def test_a_soft_error_that_is_no_number_stays_one():
    row = torch.tensor([[0.0, torch.nan, 1.0], [torch.nan, 2.0, 1.0], [1.0, 1.0, 0.0]])
    soft = score_rows(row, torch.ones(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.bool)).soft_error
    assert soft.isnan().tolist() == [True, True, False]
    assert soft[2] == 0.5  # a tie


def test_two_ranks_merge_to_the_whole():
    parts = [scored(*random_batch(seed, paraphrases=seed == 2, neighbours=seed == 2)[1:]) for seed in (1, 2)]
    for name, cls in METRICS.items():
        whole, ranks = cls(), [cls(), cls()]
        for rank, part in zip(ranks, parts, strict=True):
            rank.update(part)
            whole.update(part)
        ranks[0].merge_state(ranks[1])
        assert ranks[0].compute() == whole.compute(), name
        assert ranks[0].has_data, name
        assert all(state.dtype in (torch.float64, torch.int64) for state in whole.metric_state.values())


def test_metrics_without_their_data_say_so():
    _, chunks, batch = random_batch(3, paraphrases=False, neighbours=False)
    scores = scored(chunks, batch)
    for name, cls in METRICS.items():
        metric = cls()
        metric.update(scores)
        assert metric.has_data == (not name.startswith(("paraphrase", "neighbour"))), name
    assert METRICS["paraphrase_robustness"]().has_data is False


def test_ties_and_nan_are_wrong_answers():
    logits = torch.tensor([[2.0, 2.0, 0.0], [math.nan] * 3, [0.0, math.nan, 1.0], [0.0, 1.0, 2.0]])
    rows = score_rows(logits, torch.tensor([[0], [1], [2], [2]]), torch.ones(4, 1, dtype=torch.bool))
    assert rows.first_rank.tolist() == [1, 2, 1, 0]
    assert rows.all_greedy.tolist() == [False, False, False, True]
    tie = AnswerScores.gather(
        [score_rows(torch.zeros(2, 3), torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.bool))],
        {"row_fact": torch.zeros(2, dtype=torch.long), "row_role": torch.tensor([0, 2]), "id": ["a"]},
    )
    assert METRICS["choice_accuracy"]().per_fact(tie).tolist() == [0.0]
    assert METRICS["summed_choice_accuracy"]().per_fact(tie).tolist() == [0.0]


def test_states_survive_inference_mode():
    scores = scored(*random_batch(4)[1:])
    metric = METRICS["log_loss"]()
    with torch.inference_mode():
        metric.update(scores)
    metric.update(scores)
    assert metric.compute().item() == pytest.approx(METRICS["log_loss"]().per_fact(scores).mean().item())


def test_row_counts_that_do_not_match_are_errors():
    _, chunks, batch = random_batch(5)
    with pytest.raises(ValueError, match=r"`logits` must have one row per answer token \(1\), got shape \(2, 3\)"):
        score_rows(torch.zeros(2, 3), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"`chunks` must hold the batch's {len(batch['row_fact'])} rows"):
        scored(chunks[1:], batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_equals_torchmetrics(dtype):
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(5, 9, VOCAB, generator=g).to(dtype), torch.randint(VOCAB, (5, 9), generator=g)
    mask = (torch.arange(9) < torch.tensor([9, 7, 1, 2, 9])[:, None]).long()
    metric, reference = Perplexity(), ReferencePerplexity(ignore_index=-100)
    for part in (slice(0, 2), slice(2, 5)):
        part_of = windows_of({"input_ids": ids[part], "attention_mask": mask[part]})
        metric.update(*target_nll(logits[part], part_of["targets"]))
    reference.update(logits[:, :-1].float(), ids.where(mask.bool(), -100)[:, 1:])
    assert metric.compute().item() == pytest.approx(reference.compute().item(), rel=1e-5)
    assert metric.count == 8 + 6 + 0 + 1 + 8
    assert Perplexity().has_data is False
