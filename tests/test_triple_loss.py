"""triple_loss is DistilBERT's loss: against the three torch.nn losses that the authors' code is made of, in float64.

Next: test_accumulation.py, the counts; test_cosine.py, the third term alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distil_fast import reference, triple_loss
from tests.batch import Batch, as_double, assert_close, assert_identical, make_batch, run


def authors(
    b: Batch, temperature: float = 2.0, alphas: Any = (5.0, 2.0, 1.0), restrict: bool = False
) -> tuple[Tensor, ...]:
    """The step of the authors' distiller: gather the positions of each term, then apply torch's losses."""
    tokens = b.labels > -1 if restrict else b.attention_mask
    student, teacher = b.student_logits[tokens] / temperature, b.teacher_logits[tokens] / temperature
    ce = nn.KLDivLoss(reduction="batchmean")(student.log_softmax(-1), teacher.softmax(-1)) * temperature**2
    mlm = nn.CrossEntropyLoss(ignore_index=-100)(b.student_logits.flatten(0, -2), b.labels.flatten())
    student_hidden, teacher_hidden = b.student_hidden[b.attention_mask], b.teacher_hidden[b.attention_mask]
    cos = nn.CosineEmbeddingLoss()(student_hidden, teacher_hidden, student_hidden.new_ones(len(student_hidden)))
    return alphas[0] * ce + alphas[1] * mlm + alphas[2] * cos, ce, mlm, cos


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("restrict", [False, True])
def test_it_is_the_authors_loss(restrict: bool, dtype: torch.dtype, bound: float) -> None:
    b = make_batch(3, 7, dtype=dtype)
    assert len({int(b.attention_mask.sum()), int((b.labels != -100).sum()), 21}) == 3, "the denominators must differ"
    assert (b.labels[~b.attention_mask] != -100).any()
    settings: dict[str, Any] = {"temperature": 3.0, "restrict_ce_to_mask": restrict}
    alphas = {"alpha_ce": 0.7, "alpha_mlm": 1.3, "alpha_cos": 0.4}
    expected = run(lambda b: authors(b, 3.0, (0.7, 1.3, 0.4), restrict), as_double(b))
    for weights in (alphas, {name: torch.tensor(x, dtype=dtype) for name, x in alphas.items()}):
        assert_close(run(lambda b, w=weights: triple_loss(*b[:6], **w, **settings), b), expected, bound)


def test_the_defaults_are_the_authors() -> None:
    b = as_double(make_batch(3, 7))
    for function in (triple_loss, reference.triple_loss):
        assert_close(run(lambda b, f=function: f(*b[:6]), b), run(authors, b), 1e-12)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.int32, torch.float32], ids=str)
def test_an_attention_mask_is_bool_or_numbers(mask_dtype: torch.dtype) -> None:
    b = make_batch(3, 7)
    expected = run(lambda b: triple_loss(*b[:6]), b)
    actual = run(lambda b: triple_loss(*b[:5], b.attention_mask.to(mask_dtype)), b)
    assert_identical(actual, expected)


def test_counts_replace_the_three_denominators() -> None:
    b = as_double(make_batch(3, 7))
    tokens, labelled = b.attention_mask.sum(), (b.labels != -100).sum()
    default = triple_loss(*b[:6])
    terms = triple_loss(*b[:6], ce_count=10.0, mlm_count=torch.tensor(20.0), cos_count=30)
    assert_close(terms.ce, default.ce * tokens / 10.0, 1e-12)
    assert_close(terms.mlm, default.mlm * labelled / 20.0, 1e-12)
    assert_close(terms.cos, default.cos * tokens / 30.0, 1e-12)
    assert_close(terms.loss, 5.0 * terms.ce + 2.0 * terms.mlm + terms.cos, 1e-12)


def test_a_batch_of_padding_is_0_with_zero_gradients() -> None:
    b = make_batch(3, 7)
    padding = torch.zeros_like(b.attention_mask)
    values, grads = run(lambda b: triple_loss(*b[:2], torch.full_like(b.labels, -100), *b[3:5], padding), b)
    assert all(value == 0 for value in values)
    assert [g.shape for g in grads] == [b.student_logits.shape, b.student_hidden.shape]
    assert not any(g.any() for g in grads)


def test_padding_is_never_read() -> None:
    b = make_batch(3, 7)
    labels = b.labels.masked_fill(~b.attention_mask, -100)
    clean = run(lambda b: triple_loss(*b[:2], labels, *b[3:6]), b)
    padding = ~b.attention_mask.unsqueeze(-1)
    spoilt = Batch(
        *(
            t.detach().masked_fill(padding, float("nan")).requires_grad_(t.requires_grad) if t.dim() == 3 else t
            for t in b
        )
    )
    dirty = run(lambda b: triple_loss(*b[:2], labels, *b[3:6]), spoilt)
    assert_identical(dirty, clean)
    assert all(not g[~b.attention_mask].any() for g in dirty.grads)


def test_alpha_0_reads_nothing_of_its_term() -> None:
    b = make_batch(3, 7)
    nothing = b._replace(teacher_hidden=torch.full_like(b.teacher_hidden, float("nan")))
    values, grads = run(lambda b: triple_loss(*b[:6], alpha_cos=0.0), nothing)
    assert values[0].isfinite()
    assert values[3] == 0
    assert not grads[1].any()
