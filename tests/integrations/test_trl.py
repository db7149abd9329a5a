"""TRL's divergence losses by ours against the installed TRL: values, gradients, real trainers, refusals, and undo.

The truth is TRL's own eager loss in float64 on the same numbers. Where TRL is wrong, both numbers stand in the test. It
knows no kernel. Next: distil_fast/integrations/trl.py.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distil_fast.integrations import HostChangedError

pytest.importorskip("trl")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.gold import GOLDTrainer
    from trl.experimental.iw_opd import IWOPDTrainer
    from trl.trainer import distillation_trainer

from distil_fast.integrations.trl import CHUNKED_LOSS, JSD_LOSS, apply

BETAS = (0, 0.1, 0.5, 0.9, 1)
VALUE, GRADIENT = 4e-6, 3e-6  # relative, float32 against float64
host_jsd = GKDTrainer.generalized_jsd_loss
host_chunked = distillation_trainer._chunked_divergence_loss


def bare(kind: type) -> Any:
    """A trainer of that class without models: what `apply` looks at and replaces."""
    return object.__new__(kind)


def our_jsd(kind: type = GKDTrainer) -> Callable[..., Tensor]:
    trainer = bare(kind)
    apply(trainer)
    return trainer.generalized_jsd_loss


def our_chunked() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    trainer = bare(DistillationTrainer)
    apply(trainer)
    return trainer._compute_loss.__func__.__globals__[CHUNKED_LOSS]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


# ------------------------------------------------------------------------------------------------ from logits


def rows(dtype: torch.dtype = torch.float32, vocab: int = 151, apart: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits [3, 8, V] as a causal shift leaves them, and labels with a prompt and padding."""
    g = torch.Generator().manual_seed(7)
    teacher = 3 * torch.randn(3, 9, vocab, generator=g)
    student = teacher + apart * torch.randn(3, 9, vocab, generator=g)
    labels = torch.randint(vocab, (3, 9), generator=g)
    labels[:, :3] = -100
    labels[1, 6:] = -100
    return student.to(dtype)[:, :-1], teacher.to(dtype)[:, :-1], labels[:, 1:]


def graded(loss: Callable[..., Tensor], student: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Value, and gradient of the logits."""
    student = student.detach().requires_grad_()
    value = loss(student, *args, **kwargs)
    (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


def truth(student: Tensor, teacher: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return graded(host_jsd, student.double(), teacher.double(), *args, **kwargs)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_logits_value_and_gradient(beta: float, temperature: float) -> None:
    student, teacher, labels = rows()
    for options in (
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": 31},
        {"labels": labels, "num_items_in_batch": torch.tensor(31)},
        {"labels": labels, "num_items_in_batch": torch.tensor([31])},
        {"labels": labels, "reduction": "sum"},
        {"labels": labels, "reduction": "mean"},
        {},  # divided by the batch size, not by the tokens
        {"reduction": "mean"},
        {"num_items_in_batch": 31, "reduction": "none"},
    ):
        options |= {"beta": beta, "temperature": temperature}
        exact = truth(student, teacher, **options)
        found = graded(our_jsd(), student, teacher, **options)
        theirs = graded(host_jsd, student, teacher, **options)
        for ours, right, other, bound in zip(found, exact, theirs, (VALUE, GRADIENT), strict=True):
            assert relative(ours, right) < bound
            assert relative(other, right) < 1e-4  # so that all three mean the same


@pytest.mark.parametrize("kind", [GKDTrainer, GOLDTrainer, IWOPDTrainer])
def test_logits_of_every_trainer(kind: type) -> None:
    student, teacher, labels = rows()
    for args in ((labels, 0.5, 2.0), (labels,), ()):
        exact = graded(kind.generalized_jsd_loss, student.double(), teacher.double(), *args)
        found = graded(our_jsd(kind), student, teacher, *args)
        assert relative(found[0], exact[0]) < VALUE
        assert relative(found[1], exact[1]) < GRADIENT


@pytest.mark.parametrize("apart", [1.0, 0.05])
@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_logits_are_nearer_to_the_truth_than_the_hosts(beta: float, apart: float) -> None:
    student, teacher, labels = rows(torch.bfloat16, apart=apart)
    exact = truth(student, teacher, labels, beta)
    found = graded(our_jsd(), student, teacher, labels, beta)
    theirs = graded(host_jsd, student, teacher, labels, beta)
    assert found[1].dtype == torch.bfloat16
    assert relative(found[0], exact[0]) < VALUE < relative(theirs[0], exact[0])
    rounding = relative(exact[1].to(torch.bfloat16), exact[1])
    assert relative(found[1], exact[1]) < 1.1 * rounding < relative(theirs[1], exact[1])


def test_where_the_models_meet_the_hosts_float32_gradient_is_noise_and_ours_is_not() -> None:
    student, teacher, labels = rows(apart=1e-4)
    exact = truth(student, teacher, labels, 0.5)
    found = graded(our_jsd(), student, teacher, labels, 0.5)
    theirs = graded(host_jsd, student, teacher, labels, 0.5)
    assert relative(theirs[0], exact[0]) > 0.01  # a loss of 1e-9 as a sum of terms of 1e-5
    assert relative(found[0], exact[0]) < 0.001
    assert relative(found[1], exact[1]) < GRADIENT < 1e-4 < relative(theirs[1], exact[1])


def test_logits_without_a_token_that_counts() -> None:
    student, teacher, labels = rows()
    none = torch.full_like(labels, -100)
    for options in ({}, {"num_items_in_batch": 5}, {"reduction": "sum"}):
        for loss in (our_jsd(), host_jsd):
            value, grad = graded(loss, student, teacher, none, **options)
            assert value == 0
            assert not grad.any()
    assert torch.isnan(host_jsd(student, teacher, none, reduction="mean"))  # 0 / 0
    value, grad = graded(our_jsd(), student, teacher, none, reduction="mean")
    assert value == 0
    assert not grad.any()


def test_accumulated_batches_are_the_whole_batch() -> None:
    student, teacher, labels = rows()
    count = (labels != -100).sum()
    whole = graded(our_jsd(), student, teacher, labels, 0.5)
    parts = [graded(our_jsd(), student[i], teacher[i], labels[i], 0.5, num_items_in_batch=count) for i in range(3)]
    assert torch.allclose(sum(value for value, _ in parts), whole[0], rtol=1e-6)
    assert torch.allclose(torch.stack([grad for _, grad in parts]), whole[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_columns_that_no_model_can_choose(beta: float) -> None:
    """Masked columns, -inf in both models: TRL's loss is nan, and its gradient but for beta 0; ours are those of the
    other columns."""
    student, teacher, labels = rows()
    exact = truth(student[..., :100], teacher[..., :100], labels, beta)
    student, teacher = student.clone(), teacher.clone()
    student[..., 100:] = teacher[..., 100:] = -math.inf
    theirs = graded(host_jsd, student, teacher, labels, beta)
    assert torch.isnan(theirs[0])
    assert torch.isnan(theirs[1]).any() == (beta != 0)
    value, grad = graded(our_jsd(), student, teacher, labels, beta)
    assert relative(value, exact[0]) < VALUE
    assert relative(grad[..., :100], exact[1]) < GRADIENT
    assert not grad[..., 100:].any()


def test_what_stays_the_hosts() -> None:
    """Elementwise results, probabilities, a top k."""
    student, teacher, labels = rows()
    assert torch.equal(
        our_jsd()(student, teacher, labels, reduction="none"), host_jsd(student, teacher, labels, reduction="none")
    )
    probabilities = student.softmax(-1)[..., :40], teacher.softmax(-1)[..., :40]
    assert torch.equal(
        our_jsd(GOLDTrainer)(*probabilities, logits_are_probs=True),
        GOLDTrainer.generalized_jsd_loss(*probabilities, logits_are_probs=True),
    )
    for options in ({"top_k": 5}, {"top_k": 5, "add_tail": False, "beta": 0}):
        ours = our_jsd(IWOPDTrainer)(student, teacher, labels, **options)
        assert torch.equal(ours, IWOPDTrainer.generalized_jsd_loss(student, teacher, labels, **options))


def test_vocabularies_of_two_widths_are_refused_as_by_the_host() -> None:
    student, teacher, labels = rows()
    for loss in (host_jsd, our_jsd()):
        with pytest.raises((RuntimeError, ValueError)):
            loss(student, teacher[..., :-1], labels)


class _SumsRows:
    """The DistillationTrainer of TRL 1.10 and before: elementwise, then masked by rows and summed."""

    generalized_jsd_loss = staticmethod(host_jsd)

    @staticmethod
    def _reduce_divergence_loss(jsd: Tensor, completion_mask: Tensor, num_items_in_batch: int) -> Tensor:
        return jsd[completion_mask.bool()].sum() / num_items_in_batch


def test_rows_where_the_host_masks_and_sums_them() -> None:
    student, teacher, labels = rows()
    mask = labels != -100
    reduce = _SumsRows._reduce_divergence_loss
    ours = our_jsd(_SumsRows)
    exact = graded(lambda s: reduce(host_jsd(s, teacher.double(), reduction="none"), mask, 9), student.double())
    found = graded(lambda s: reduce(ours(s, teacher, reduction="none"), mask, 9), student)
    assert ours(student, teacher, reduction="none").shape == (3, 8)
    assert ours(student, teacher, labels, reduction="none").shape == (int(mask.sum()),)
    assert relative(found[0], exact[0]) < VALUE
    assert relative(found[1], exact[1]) < GRADIENT


# ------------------------------------------------------------------------------------------------ from hidden states


def heads(dtype: torch.dtype = torch.float32, vocab: int = 211, teacher_vocab: int = 211) -> list[Tensor]:
    """Hidden states [2, 7, H] of both models, heads, a mask of integers."""
    g = torch.Generator().manual_seed(3)
    shapes = (2, 7, 16), (2, 7, 24), (vocab, 16), (teacher_vocab, 24)
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]])
    return [*tensors, mask]


def options_of(**given: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(5)
    bias = {
        "student_lm_head_bias": torch.randn(211, generator=g),
        "teacher_lm_head_bias": torch.randn(211, generator=g),
    }
    scales = {"student_logit_scale": 0.5, "teacher_logit_scale": 0.7}
    caps = {"student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 5.0}
    return {**bias, **scales, **caps, **given}


def graded_heads(loss: Callable[..., Any], tensors: list[Tensor], beta: float, **options: Any) -> list[Tensor]:
    """Loss, entropy and number; gradients of hidden states, weight and bias."""
    leaves = [tensors[0].detach().requires_grad_(), tensors[2].detach().requires_grad_()]
    if options.get("student_lm_head_bias") is not None:
        leaves.append(options["student_lm_head_bias"].detach().requires_grad_())
        options["student_lm_head_bias"] = leaves[2]
    made = loss(leaves[0], tensors[1], leaves[1], tensors[3], tensors[4], beta, **options)
    return [*(x.detach() for x in made), *torch.autograd.grad(made[0], leaves)]


def whole_logits(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    teacher_weight: Tensor,
    mask: Tensor,
    beta: float,
    num_items_in_batch: Any = None,
    temperature: float = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the chunked loss means, with both models' whole logits."""

    def logits(hidden: Tensor, head: Tensor, model: str) -> Tensor:
        x = hidden @ head.t()
        bias, cap = options.get(f"{model}_lm_head_bias"), options.get(f"{model}_final_logit_softcapping")
        x = (x if bias is None else x + bias) * options.get(f"{model}_logit_scale", 1.0)
        return x if cap is None else cap * torch.tanh(x / cap)

    s, t = logits(student, weight, "student"), logits(teacher, teacher_weight, "teacher")
    labels = torch.where(mask != 0, 0, -100)
    loss = host_jsd(s, t, labels, beta, temperature, num_items_in_batch=num_items_in_batch)
    log_q = (s / temperature).log_softmax(-1)[mask != 0]
    return loss, -(log_q.exp() * log_q).sum(), (mask != 0).sum()


def doubled(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def true_heads(tensors: list[Tensor], beta: float, **options: Any) -> list[Tensor]:
    wide = {name: doubled(value) for name, value in options.items()}
    return graded_heads(whole_logits, [doubled(x) for x in tensors], beta, **wide)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_hidden_value_entropy_and_gradient(beta: float, temperature: float) -> None:
    tensors = heads()
    for options in (
        {"temperature": temperature},
        {"temperature": temperature, "num_items_in_batch": torch.tensor(17.0)},
        options_of(temperature=temperature, num_items_in_batch=17),
    ):
        exact = true_heads(tensors, beta, **options)
        found = graded_heads(our_chunked(), tensors, beta, **options)
        theirs = graded_heads(host_chunked, tensors, beta, **options)
        assert int(found[2]) == int(theirs[2]) == 10
        for i in (0, 1, *range(3, len(exact))):
            assert found[i].dtype == torch.float32
            assert relative(found[i], exact[i]) < 2 * GRADIENT, i
            assert relative(theirs[i], exact[i]) < 1e-4, i


@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_hidden_is_not_farther_from_the_truth_than_the_hosts(beta: float) -> None:
    tensors = heads(torch.bfloat16)
    exact = true_heads(tensors, beta)
    found = graded_heads(our_chunked(), tensors, beta)
    theirs = graded_heads(host_chunked, tensors, beta)
    for i, bound in ((0, VALUE), (1, VALUE), (3, 0.0), (4, 0.0)):
        assert relative(found[i], exact[i]) < max(bound, 1.05 * relative(theirs[i], exact[i])), i
    assert found[3].dtype == found[4].dtype == torch.bfloat16


def test_hidden_in_autocast() -> None:
    tensors = heads()
    with torch.autocast("cpu", torch.bfloat16):
        found = graded_heads(our_chunked(), tensors, 0.5)
        theirs = graded_heads(host_chunked, tensors, 0.5)
    for i, bound in ((0, 1e-5), (1, 1e-5), (3, 0.01), (4, 0.01)):
        assert relative(found[i], theirs[i].double()) < bound, i


def test_hidden_without_a_token_that_counts() -> None:
    tensors = heads()
    tensors[4] = torch.zeros_like(tensors[4])
    for loss in (our_chunked(), host_chunked):
        for count in (None, 6):
            made = graded_heads(loss, tensors, 0.5, num_items_in_batch=count)
            assert all(not x.any() and x.isfinite().all() for x in made)


def test_hidden_near_one_another_the_hosts_difference_of_large_sums_and_our_divergence() -> None:
    """At beta 0 TRL's loss is a weighted gap minus the difference of two normalisers."""
    tensors = heads()
    noise = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    tensors[1], tensors[3] = tensors[0] + 3e-5 * noise, tensors[2]
    exact = true_heads(tensors, 0.0)
    assert relative(graded_heads(host_chunked, tensors, 0.0)[0], exact[0]) > 1.0
    assert relative(graded_heads(our_chunked(), tensors, 0.0)[0], exact[0]) < 0.01


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")  # by TRL
def test_a_wider_teachers_first_columns_take_part_and_a_narrower_is_refused() -> None:
    tensors = heads(teacher_vocab=230)
    theirs = graded_heads(host_chunked, tensors, 0.5)
    found = graded_heads(our_chunked(), tensors, 0.5)
    for i in (0, 1, 3, 4):
        assert relative(found[i], theirs[i].double()) < 1e-5
    for loss in (host_chunked, our_chunked()):
        with pytest.raises((RuntimeError, ValueError)):
            loss(*heads(teacher_vocab=190), 0.5)


def test_heads_that_fsdp_shards(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    tensors, options = heads(), options_of()
    plain = graded_heads(our_chunked(), tensors, 0.5, **options)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for i in (2, 3):
            tensors[i] = distribute_tensor(tensors[i], mesh, [Shard(0)])
        for name in ("student_lm_head_bias", "teacher_lm_head_bias"):
            options[name] = distribute_tensor(options[name], mesh, [Shard(0)])
        found = graded_heads(our_chunked(), tensors, 0.5, **options)
        assert all(
            torch.equal(x.full_tensor() if hasattr(x, "full_tensor") else x, y)
            for x, y in zip(found, plain, strict=True)
        )
    finally:
        distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------ apply and undo


def test_undo_leaves_the_trainer_as_it_was_and_the_module_is_never_touched() -> None:
    for kind, name in ((GKDTrainer, JSD_LOSS), (DistillationTrainer, "_compute_loss")):
        trainer = bare(kind)
        before = getattr(trainer, name)
        with apply(trainer):
            assert set(vars(trainer)) == {name}
            assert getattr(trainer, name) != before
            assert getattr(bare(kind), name).__class__ is before.__class__
            assert distillation_trainer._chunked_divergence_loss is host_chunked
        assert not vars(trainer)
        assert GKDTrainer.generalized_jsd_loss is host_jsd


def test_twice_is_undone_twice() -> None:
    trainer = bare(GKDTrainer)
    first, second = apply(trainer), apply(trainer)
    student, teacher, labels = rows()
    assert relative(trainer.generalized_jsd_loss(student, teacher, labels), truth(student, teacher, labels)[0]) < VALUE
    second.undo()
    first.undo()
    assert not vars(trainer)


def test_a_host_that_changed_is_refused() -> None:
    def fewer(student_logits: Any, teacher_logits: Any, labels: Any = None, beta: float = 0.5) -> None: ...

    def more(*, scale: float = 1.0, **given: Any) -> None: ...

    with pytest.raises(HostChangedError, match="temperature, reduction, num_items_in_batch"):
        apply(SimpleNamespace(generalized_jsd_loss=fewer))
    more.__signature__ = _with_parameter(host_jsd, "squared")  # type: ignore[attr-defined]
    with pytest.raises(HostChangedError, match="squared"):
        apply(SimpleNamespace(generalized_jsd_loss=more))
    with pytest.raises(HostChangedError, match="neither"):
        apply(SimpleNamespace())


def _with_parameter(function: Callable[..., Any], name: str) -> Any:
    import inspect

    signature = inspect.signature(function)
    extra = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*signature.parameters.values(), extra])


def _doctored(**names: Any) -> Any:
    """A DistillationTrainer whose module has other globals."""
    method = DistillationTrainer._compute_loss
    kept = {name: value for name, value in method.__globals__.items() if name != CHUNKED_LOSS}
    changed = FunctionType(method.__code__, {**kept, **names}, closure=method.__closure__)
    return bare(type("Doctored", (), {"_compute_loss": changed}))


def test_a_host_whose_chunked_loss_changed_is_refused() -> None:
    with pytest.raises(HostChangedError, match="the function is gone"):
        apply(_doctored())
    with pytest.raises(HostChangedError, match="student_lm_head_weight"):
        apply(_doctored(**{CHUNKED_LOSS: lambda student_hidden_states: None}))
    changed = FunctionType(host_chunked.__code__, {}, argdefs=host_chunked.__defaults__)
    changed.__signature__ = _with_parameter(host_chunked, "top_k")  # type: ignore[attr-defined]
    with pytest.raises(HostChangedError, match="without top_k"):
        apply(_doctored(**{CHUNKED_LOSS: changed}))


def test_an_older_chunked_loss_says_how_large_its_chunks_are() -> None:
    """TRL 1.11 to 1.14."""

    def older(*args: Any, **given: Any) -> None: ...

    older.__signature__ = _with_parameter(host_chunked, "chunk_size")  # type: ignore[attr-defined]
    trainer = _doctored(**{CHUNKED_LOSS: older})
    apply(trainer)
    loss = trainer._compute_loss.__func__.__globals__[CHUNKED_LOSS]
    found = graded_heads(lambda *a, **k: loss(*a, chunk_size=4, **k), heads(), 0.5)
    assert all(torch.equal(x, y) for x, y in zip(found, graded_heads(our_chunked(), heads(), 0.5), strict=True))


def test_an_overridden_method_is_refused() -> None:
    class Mine(DistillationTrainer):  # type: ignore[misc]
        def _compute_loss(self, *args: Any) -> Any:
            return super()._compute_loss(*args)

    with pytest.raises(HostChangedError, match=r"Mine\._compute_loss"):
        apply(bare(Mine))


@pytest.mark.parametrize("flag", ["use_uld_loss", "use_liger_gkd_loss", "use_liger_loss"])
def test_a_trainer_that_uses_another_loss_is_refused(flag: str) -> None:
    trainer = bare(GOLDTrainer)
    setattr(trainer, flag, True)
    with pytest.raises(ValueError, match=flag):
        apply(trainer)


# ------------------------------------------------------------------------------------------------ trainers

WORDS = ["<pad>", "<eos>", "user", "assistant", *(f"w{i}" for i in range(120))]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
quiet = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def tokenizer() -> Any:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=64
    )
    made.chat_template = TEMPLATE
    return made


def model(seed: int, width: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """One step of two micro-batches, by SGD: the weights move by the gradient."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
        "disable_tqdm": True,
        **more,
    }


def gkd(folder: Path) -> Any:
    words = " ".join(WORDS[4:]).split()
    talks = [(words[i : i + 2 + i % 3], words[20 + i : 24 + i + i % 5]) for i in range(8)]
    data = [
        {"messages": [{"role": "user", "content": " ".join(a)}, {"role": "assistant", "content": " ".join(b)}]}
        for a, b in talks
    ]
    return GKDTrainer(
        model=model(0, 8),
        teacher_model=model(1, 12),
        args=GKDConfig(**settings(folder, lmbda=0.0, beta=0.3)),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
    )


def distillation(folder: Path) -> Any:
    prompts = [" ".join(WORDS[4 + i : 7 + i + i % 3]) for i in range(8)]
    return DistillationTrainer(
        model=model(0, 8),
        teacher_model=model(1, 12),
        args=DistillationConfig(**settings(folder, beta=0.3, max_completion_length=8)),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
    )


@quiet
@pytest.mark.parametrize("build", [gkd, distillation])
def test_a_step_of_a_real_trainer(build: Callable[[Path], Any], tmp_path: Path) -> None:
    """The same step with and without `apply`: what is logged, and what the weights move by."""
    logged, moved = [], []
    for ours in (False, True):
        trainer = build(tmp_path)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        if ours:
            apply(trainer)
        trainer.train()
        logged.append(trainer.state.log_history[0])
        moved.append({name: p.detach() - start[name] for name, p in trainer.model.named_parameters()})
    for name in {"loss", "entropy", "grad_norm"} & set(logged[0]):
        assert math.isclose(logged[0][name], logged[1][name], rel_tol=1e-5), name
    assert ("entropy" in logged[0]) == (build is distillation)
    for name, move in moved[0].items():
        assert move.norm() > 0, name
        assert relative(moved[1][name], move.double()) < 2e-4, name
