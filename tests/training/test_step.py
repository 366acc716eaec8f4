"""One optimizer step: accumulation, division by valid tokens, learning-rate factor, precision of main parameters."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from megatron_mup.layers.loss import IGNORE
from megatron_mup.optim.adamw import AdamW
from megatron_mup.optim.clip import clip_factor, scale_grads
from megatron_mup.optim.main_params import local_part
from megatron_mup.training.step import Gate, always
from tests.runs import batch_of, config_of, relative_error, step_of, values


def test_loss_is_the_mean_over_valid_tokens(lone_mesh):
    config = config_of()
    step, batch = step_of(config, lone_mesh), batch_of(config)
    with torch.no_grad():
        logits = step.model(batch["tokens"]).transpose(0, 1).flatten(0, 1)
    want = F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORE)
    total, count = step.evaluate(batch)
    assert count == (batch["labels"] != IGNORE).sum()
    torch.testing.assert_close(total / count, want)
    torch.testing.assert_close(step(batch, 1.0).loss, want)


@pytest.mark.parametrize("micro", [1, 4])
def test_accumulation_changes_nothing(lone_mesh, micro):
    """Micro-batches hold different numbers of valid tokens, so a mean of means would differ."""
    seen = []
    for flags in ("--micro-batch-size 2", f"--micro-batch-size {micro}"):
        config = config_of(flags, "--hidden-dropout 0.1 --attention-dropout 0.1")
        step = step_of(config, lone_mesh)
        batch = batch_of(config)
        batch["labels"][0] = IGNORE
        seen.append((step(batch, 1.0), values(step)))
    torch.testing.assert_close(seen[0][0].loss, seen[1][0].loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(seen[0][0].grad_norm, seen[1][0].grad_norm, rtol=1e-5, atol=0)
    for name, value in seen[0][1].items():
        assert relative_error(seen[1][1][name], value) < 1e-5 or value.norm() < 1e-3, name


def test_factor_zero_moves_nothing(lone_mesh):
    for optimizer in ("adam", "muon"):
        config = config_of(f"--optimizer {optimizer}")
        step = step_of(config, lone_mesh)
        before = values(step)
        step(batch_of(config), 0.0)
        assert all(torch.equal(value, before[name]) for name, value in values(step).items())
        step(batch_of(config), 0.5)
        assert not any(torch.equal(value, before[name]) for name, value in values(step).items())


def test_requests_are_summed_and_gradients_dropped(lone_mesh):
    step = step_of(config_of(), lone_mesh)
    assert step(batch_of(config_of()), 1.0, request=1 << 40).request == 1 << 40
    assert all(main.grad is None for main in step.main.params)
    assert all(param.grad is None for param in step.model.parameters())


def test_a_batch_without_labels_is_harmless(lone_mesh):
    config = config_of("--weight-decay 0")
    step, batch = step_of(config, lone_mesh), batch_of(config)
    batch["labels"].fill_(IGNORE)
    before = values(step)
    result = step(batch, 1.0)
    assert result.loss == result.grad_norm == 0
    assert all(torch.equal(value, before[name]) for name, value in values(step).items())


def test_evaluation_has_no_dropout_and_leaves_no_gradient(lone_mesh):
    plain, dropping = (step_of(config_of(f"--hidden-dropout {p}"), lone_mesh) for p in (0.0, 0.5))
    batch = batch_of(config_of())
    torch.testing.assert_close(dropping.evaluate(batch), plain.evaluate(batch))
    assert all(param.grad is None for param in dropping.model.parameters())
    assert abs(dropping(batch, 1.0).loss - plain(batch, 1.0).loss) > 1e-3


@pytest.mark.parametrize(
    "flags", ["", "--parametrization umup --disable-bias-linear --untie-embeddings-and-output-weights"]
)
def test_the_norm_may_come_with_the_update(lone_mesh, monkeypatch, flags):
    """AdamW's kernel finds squares on its way where nothing waits for the norm: the same norm, and no pass for it."""
    plain = AdamW.step

    def measuring(self, factor, scale=None, measure=False):
        if measure:
            for param in self._params:
                param.square = param.grad.square().sum()
        plain(self, factor, scale)
        if measure:
            monkeypatch.setattr(torch, "_foreach_norm", None)  # from here on nobody may look at gradients again

    def norm_and_weights(clip: str, gate: Gate = always):
        step = step_of(config_of(flags, "--clip-grad", clip), lone_mesh)
        return step(batch_of(step.config), 1.0, gate=gate).grad_norm, values(step)

    want, weights = norm_and_weights("1e9")
    monkeypatch.setattr(AdamW, "measures", True)
    monkeypatch.setattr(AdamW, "step", measuring)
    torch.testing.assert_close(norm_and_weights("0", lambda _loss, norm: bool(norm == want))[0], want)
    got, changed = norm_and_weights("0")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert all(torch.equal(value, weights[name]) for name, value in changed.items())


def test_bf16_keeps_fp32_copies(lone_mesh):
    """Steps too small for bf16 add up in the copies; the module holds their roundings."""
    config = config_of("--bf16 --lr 1e-5")
    step = step_of(config, lone_mesh)
    start = values(step)
    results = [step(batch_of(config, number), 1.0) for number in range(3)]
    for main in step.main.params:
        param = local_part(step.main.modules_params[main.meta.name].detach())
        assert param.dtype == torch.bfloat16
        assert main.value.dtype == torch.float32
        assert torch.equal(param, main.value.bfloat16())
        assert not torch.equal(main.value, start[main.meta.name])
    exact = step_of(config_of("--lr 1e-5"), lone_mesh)
    for number, result in enumerate(results):
        want = exact(batch_of(config, number), 1.0)
        assert result.loss.dtype == torch.float32
        torch.testing.assert_close(result.loss, want.loss, rtol=5e-3, atol=0)
        torch.testing.assert_close(result.grad_norm, want.grad_norm, rtol=5e-2, atol=0)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_for_fp32_copies(lone_mesh, micro_batches):
    """Of one micro-batch they stay in bf16, as they came; of several they are summed in fp32. Clipping is in fp32."""
    config = config_of(f"--bf16 --micro-batch-size 2 --global-batch-size {2 * micro_batches}")
    step, batch = step_of(config, lone_mesh), batch_of(config)
    parts = []
    for part in range(micro_batches):
        one = {name: value[2 * part : 2 * part + 2] for name, value in batch.items()}
        step.forward_backward(one, torch.ones(()))
        step.main.collect_grads()
        parts.append([main.grad for main in step.main.params])
        step.main.zero_grad()
    assert {grad.dtype for grad in parts[0]} == {torch.bfloat16}
    step.forward_backward(batch, torch.ones(()))
    step.main.collect_grads()
    for main, *grads in zip(step.main.params, *parts, strict=True):
        assert main.grad.dtype == (torch.bfloat16 if micro_batches == 1 else torch.float32)
        torch.testing.assert_close(main.grad.float(), torch.stack(grads).float().sum(0), rtol=1e-6, atol=1e-7)
    before = [main.grad.float().clone() for main in step.main.params]
    scale_grads(step.main.params, clip_factor(torch.tensor(10.0), 1.0))
    for main, grad in zip(step.main.params, before, strict=True):
        assert main.grad.dtype == torch.float32
        torch.testing.assert_close(main.grad, grad / (10 + 1e-6), rtol=1e-6, atol=0)


def test_a_step_that_is_over_leaves_no_copies(lone_mesh):
    step = step_of(config_of("--bf16"), lone_mesh)
    step(batch_of(step.config), 1.0)
    copy = weakref.ref(step.main.params[0].value)
    del step
    gc.collect()
    assert copy() is None


def test_pure_bf16_has_no_copies(lone_mesh):
    step = step_of(config_of("--bf16 --main-params-dtype bf16"), lone_mesh)
    assert not step.main.copied
    assert {main.value.dtype for main in step.main.params} == {torch.bfloat16}
    assert torch.isfinite(step(batch_of(config_of()), 1.0).loss)
