from __future__ import annotations

import json
import math
import pickle
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mup.config import Config, LoggingConfig, ModelConfig, TrainingConfig
from megatron_mup.training import metrics as module
from megatron_mup.training.flops import flops_per_token
from megatron_mup.training.metrics import Metrics, NonFiniteError, StepTimer

CPU = torch.device("cpu")
SEQ, VOCAB = 64, 100


def mesh(rank=0, size=2, device=CPU):
    return SimpleNamespace(device=device, world=SimpleNamespace(size=lambda: size, get_rank=lambda: rank))


def make(tmp_path, *, log_interval=5, start=0, train_iters=12, rank=0, device=CPU, logging_rank=0):
    config = Config(
        model=ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4),
        training=TrainingConfig(seq_length=SEQ),
        logging=LoggingConfig(log_interval=log_interval, metrics_file=str(tmp_path / "m.jsonl")),
    )
    return Metrics(config, mesh(rank, device=device), VOCAB, start, train_iters, logging_rank)


def step(metrics, iteration, loss=None, grad_norm=1.0, device=CPU, **more):
    value = 1 / iteration if loss is None else loss
    metrics.record(
        iteration,
        4 * iteration,
        torch.tensor(value, device=device, requires_grad=True),
        torch.tensor(grad_norm, device=device),
        {"embedding": 1e-3, "qkv": 5e-4},
        4,
        4 * SEQ,
        **more,
    )


def read(tmp_path):
    """Records without the lines of starts."""
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    return [record for record in records if "run" not in record]


def test_every_step_is_recorded_once_at_intervals_and_at_the_end(tmp_path, capsys):
    with make(tmp_path) as metrics:
        for iteration in range(1, 13):
            step(metrics, iteration)
            assert len(read(tmp_path)) == (12 if iteration == 12 else iteration // 5 * 5)
    records = read(tmp_path)
    assert [r["iteration"] for r in records] == list(range(1, 13))
    assert [r["train/lm loss"] for r in records] == [torch.tensor(1 / i).item() for i in range(1, 13)]
    assert records[2] == {
        "iteration": 3,
        "train/lm loss": torch.tensor(1 / 3).item(),
        "train/grad norm": 1.0,
        "train/batch size": 4,
        "train/consumed samples": 12,
        "train/consumed tokens": 12 * SEQ,
        "lr/embedding": 1e-3,
        "lr/qkv": 5e-4,
    }
    assert [r["iteration"] for r in records if "time/step" in r] == [5, 10, 12]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    mean = sum(1 / i for i in range(1, 6)) / 5
    assert f"lm loss: {mean:.6E}" in lines[0]


def test_throughput(tmp_path, monkeypatch):
    now = [50.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda device: "", raising=False)
    metrics = make(tmp_path, log_interval=2)
    metrics._peak = 1e12
    for iteration in (1, 2):
        with metrics.timer("data"):
            now[0] += 0.5
        with metrics.timer("forward-backward"):
            now[0] += 1.5
        if iteration == 1:
            with metrics.pause("evaluation"):
                now[0] += 100
        step(metrics, iteration, phases={"optimizer": 0.25})
    metrics.close()
    last = read(tmp_path)[-1]
    assert last["time/step"] == 2.0
    assert last["time/data"] == 0.5
    assert last["time/forward-backward"] == 1.5
    assert last["time/optimizer"] == 0.25
    assert last["time/evaluation"] == 100
    assert last["throughput/tokens per s"] == 4 * SEQ / 2
    assert last["throughput/tokens per s per device"] == 4 * SEQ / 4
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
    for causal in ("half", "full"):
        tflops = 4 * SEQ / 4 * flops_per_token(model, SEQ, VOCAB, causal) / 1e12
        assert last[f"throughput/TFLOP/s per device (causal {causal})"] == pytest.approx(tflops)
        assert last[f"throughput/MFU (causal {causal})"] == pytest.approx(tflops)
    assert 0 < last["memory/max host resident GiB"] < 100


def test_intervals_are_independent(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    metrics = make(tmp_path, log_interval=2, train_iters=4)
    for iteration, seconds in ((1, 9.0), (2, 9.0), (3, 1.0), (4, 1.0)):
        now[0] += seconds
        if iteration == 2:
            metrics.record_eval(1, "validation", 2.0)  # writes step 1, but doesn't cut the interval
        step(metrics, iteration)
    metrics.close()
    assert [r["time/step"] for r in read(tmp_path) if "time/step" in r] == [9.0, 1.0]


def test_no_mfu_where_the_peak_is_unknown(tmp_path):
    metrics = make(tmp_path, log_interval=1)
    step(metrics, 1)
    metrics.close()
    assert not [name for name in read(tmp_path)[0] if "MFU" in name]


def test_record_never_reads_the_device_inside_an_interval(tmp_path):
    """A meta tensor has no value: whatever would bring one to the host raises."""
    meta = torch.device("meta")
    metrics = make(tmp_path, device=meta, log_interval=5)
    for iteration in range(1, 5):
        with metrics.timer("data"):
            pass
        step(metrics, iteration, device=meta)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta"):
        step(metrics, 5, device=meta)


def test_one_transfer_per_interval(tmp_path, monkeypatch):
    transfers = []
    for name in ("item", "tolist", "cpu", "numpy", "to", "__float__", "__bool__", "__int__"):
        real = getattr(torch.Tensor, name)

        def counted(self, *args, real=real, name=name, **kwargs):
            transfers.append(name)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    metrics = make(tmp_path, log_interval=5)
    for iteration in range(1, 12):
        step(metrics, iteration)
    assert transfers == ["tolist"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path):
    device = torch.device("cuda")
    metrics = make(tmp_path, device=device, log_interval=5)
    loss, norm, work = torch.ones((), device=device), torch.ones((), device=device), torch.ones(2048, 2048).cuda()
    for iteration in range(1, 6):
        torch.cuda.set_sync_debug_mode("error" if iteration < 5 else "default")
        with metrics.timer("forward-backward"):
            for _ in range(20):
                work = (work @ work).clamp(0, 1)
        metrics.record(iteration, 4 * iteration, loss, norm, {"qkv": 1e-3}, 4, 4 * SEQ)
    with metrics.pause("checkpoint"):
        pass
    metrics.close()
    last = read(tmp_path)[-1]
    assert 0 < last["time/forward-backward"] <= last["time/step"] * 1.01
    assert last["memory/max allocated GiB"] >= 2048 * 2048 * 4 / 2**30


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
@pytest.mark.parametrize("rank", [0, 1])
def test_non_finite_stops_every_rank(tmp_path, loss, norm, rank):
    metrics = make(tmp_path, rank=rank)
    step(metrics, 1)
    step(metrics, 2)
    step(metrics, 3, loss, norm)
    step(metrics, 4)
    with pytest.raises(NonFiniteError, match="iteration 3: loss") as caught:
        step(metrics, 5)
    assert caught.value.iteration == 3
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.iteration, str(again)) == (3, str(caught.value))
    if rank == 0:
        assert [r["iteration"] for r in read(tmp_path)] == [1, 2]
    metrics.close()


def test_flush_keeps_a_broken_state_from_being_saved(tmp_path):
    metrics = make(tmp_path)
    step(metrics, 1, math.nan)
    with pytest.raises(NonFiniteError):
        metrics.flush()


def test_evaluation(tmp_path, capsys):
    metrics = make(tmp_path)
    step(metrics, 1)
    results = metrics.record_eval(1, "validation", 2.0, bytes_per_token=4.0)
    assert results == {
        "lm loss": 2.0,
        "perplexity": math.exp(2.0),
        "bits per byte": pytest.approx(2.0 / math.log(2) / 4),
    }
    assert metrics.record_eval(1, "test", 1000.0).keys() == {"lm loss", "perplexity"}
    train, validation, test = read(tmp_path)
    assert train["iteration"] == 1
    assert "time/step" not in train
    assert validation == {"iteration": 1, **{f"validation/{name}": value for name, value in results.items()}}
    assert test["test/lm loss"] == 1000.0
    assert "validation bits per byte: 0.72" in capsys.readouterr().out
    metrics.close()


def test_resumed_run_is_one_history(tmp_path):
    with make(tmp_path) as metrics:
        for iteration in range(1, 9):
            step(metrics, iteration)
    with make(tmp_path, start=6) as metrics:
        for iteration in range(7, 13):
            step(metrics, iteration)
    assert [r["iteration"] for r in read(tmp_path)] == list(range(1, 13))


def test_other_ranks_are_silent(tmp_path, capsys):
    with make(tmp_path, rank=1) as metrics:
        for iteration in range(1, 13):
            step(metrics, iteration)
        metrics.message("hello")
        metrics.record_eval(12, "validation", 1.0)
    assert not (tmp_path / "m.jsonl").exists()
    assert capsys.readouterr().out == ""


def test_another_rank_may_log(tmp_path, capsys):
    with make(tmp_path, rank=1, logging_rank=1) as metrics:
        step(metrics, 1)
        metrics.message("hello")
    assert len(read(tmp_path)) == 1
    assert "hello" in capsys.readouterr().out


def test_error_closes_without_asking_the_device(tmp_path):
    meta = torch.device("meta")
    metrics = make(tmp_path, device=meta)
    step(metrics, 1, device=meta)
    with pytest.raises(KeyError), metrics:
        raise KeyError
    assert metrics._sinks[0]._file.closed


def test_tensorboard_gets_every_step(tmp_path):
    config = Config(
        training=TrainingConfig(seq_length=SEQ), logging=LoggingConfig(log_interval=2, tensorboard_dir=str(tmp_path))
    )
    with Metrics(config, mesh(), VOCAB, 0, 4) as metrics:
        for iteration in range(1, 5):
            step(metrics, iteration)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("train/lm loss")] == [1, 2, 3, 4]
    assert [e.step for e in events.Scalars("throughput/tokens per s per device")] == [2, 4]
    assert {"lr/embedding", "train/grad norm", "memory/max host resident GiB"} <= set(events.Tags()["scalars"])


def test_timer():
    timer = StepTimer(CPU)
    for _ in range(2):
        with timer("a"):
            time.sleep(0.01)
    timer.add("b", 3.0)
    taken = timer.take()
    assert 0.02 <= taken["a"] < 1
    assert taken["b"] == 3.0
    assert timer.take() == {}
