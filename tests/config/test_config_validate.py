import os

import pytest
from config_cases import GOOD, build, warnings, with_value

from megatron_mup.config import Config, ConfigError, check_paths, check_vocab_size, parse_config, validate
from megatron_mup.config.bounds import BOUNDS
from megatron_mup.config.fields import settings

EXACT = "--vocab-size 256 --train-iters 10"


def check(argv: str, world_size: int = 1) -> list[str]:
    parsed = parse_config(argv.split())
    return validate(parsed.config, world_size, parsed.explicit)


def refused(argv: str, world_size: int = 1) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check(argv, world_size)
    return caught.value


@pytest.mark.parametrize(
    ("argv", "world_size", "name"),
    [
        ("", 2, "2 ranks"),
        ("--use-torch-fsdp2 --tensor-model-parallel-size 2", 4, "4 ranks"),
        ("--use-torch-fsdp2 --num-distributed-optimizer-instances 2", 4, "4 ranks"),
        ("--use-torch-fsdp2 --bf16 --fp8-format hybrid --transformer-impl transformer_engine", 2, "2 ranks"),
        ("--num-experts 4 --disable-bias-linear", 1, "--num-experts 4"),
        ("--hidden-dropout 0.1", 1, "--hidden-dropout 0.1"),
        ("--diagnostics-interval 5", 1, "--diagnostics-interval 5"),
    ],
)
def test_what_a_cuda_graph_cannot_hold(argv, world_size, name):
    error = refused(f"{EXACT} --cuda-graph-impl local {argv}", world_size)
    assert name in str(error)
    assert "--cuda-graph-impl" in str(error)
    check(f"{EXACT} --mock-data --cuda-graph-impl local")
    check(f"{EXACT} --mock-data --cuda-graph-impl local --use-torch-fsdp2", 2)


@pytest.mark.parametrize(
    ("argv", "world_size"),
    [
        ("", 1),
        ("", 8),
        ("--tensor-model-parallel-size 4 --sequence-parallel --swiglu", 8),
        ("--num-query-groups 4 --tensor-model-parallel-size 4", 4),
        ("--pipeline-model-parallel-size 2 --global-batch-size 8 --tensor-model-parallel-size 2", 8),
        ("--use-torch-fsdp2 --num-distributed-optimizer-instances 2", 8),
        ("--use-torch-fsdp2 --data-parallel-sharding-strategy optim_grads_params", 8),
        ("--use-distributed-optimizer --data-parallel-sharding-strategy optim_grads_params", 8),
        ("--rampup-batch-size 4 4 1000 --global-batch-size 16 --micro-batch-size 2", 2),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 4 --lr-warmup-iters 6", 1),
        ("--lr-decay-style power --lr-warmup-fraction 0.1 --lr-wsd-decay-iters 3", 1),
        ("--hidden-size 100 --num-attention-heads 3 --kv-channels 64", 1),
        ("--eval-interval 5", 1),
        ("--eval-iters 0", 1),
        ("--no-mock-data --data-path a --eval-interval 3 --eval-iters 0 --split 1,0,0", 1),
        ("--tokenizer-type NullTokenizer --eod-mask-loss", 1),
        ("--optimizer muon --muon-momentum 0.9 --muon-ns-dtype fp32", 1),
        ("--context-parallel-size 4 --cp-comm-type all_gather --use-torch-fsdp2 --window-size 9", 4),
        ("--parametrization completep --mup-base-hidden-size 64 --base-num-layers 2 --depth-alpha 0.5", 1),
    ],
)
def test_what_works_passes_without_a_word(argv, world_size):
    assert warnings(*argv.split(), world_size=world_size) == []


@pytest.mark.parametrize(
    ("argv", "world_size", "parts"),
    [
        # model
        ("--num-attention-heads 7", 1, ["--num-attention-heads 7", "--hidden-size 763 or 770", "--kv-channels"]),
        ("--num-attention-heads 12 --num-query-groups 5", 1, ["--num-query-groups 5", "1, 2, 3, 4, 6 or 12"]),
        ("--kv-channels 63", 1, ["63 channels per head", "pairs"]),
        ("--kv-channels 64 --rotary-percent 0.01", 1, ["--rotary-percent 0.01", "pairs"]),
        ("--max-position-embeddings 512", 1, ["--max-position-embeddings 512", "--seq-length 1024"]),
        ("--swiglu --squared-relu", 1, ["--swiglu", "--squared-relu"]),
        ("--attention-backend flash --attention-dropout 0.1", 1, ["flash", "--attention-dropout 0.1"]),
        ("--attention-backend flash --reset-attention-mask --eod-token-id 0", 1, ["FlashAttention takes no mask"]),
        ("--attention-backend flash4 --bf16 --window-size 8", 1, ["flash4", "--window-size 8", "no window"]),
        ("--attention-backend flash4", 1, ["no kernel for fp32", "--bf16"]),
        ("--attention-backend flash4 --bf16 --kv-channels 12", 1, ["heads of 8, 16, ... 256 channels, not 12"]),
        # layout
        ("--tensor-model-parallel-size 4", 6, ["--tensor-model-parallel-size 4", "start 4 or 8 ranks"]),
        ("--pipeline-model-parallel-size 2", 1, ["2 ranks", "start 2 ranks"]),
        ("--tensor-model-parallel-size 8", 8, ["--num-attention-heads 12", "1, 2, 3, 4, 6 or 12"]),
        ("--num-query-groups 2 --tensor-model-parallel-size 4", 4, ["--num-query-groups 2", "1 or 2"]),
        ("--ffn-hidden-size 100 --tensor-model-parallel-size 3", 3, ["--ffn-hidden-size 100", "99 or 102"]),
        ("--ffn-hidden-size 100 --swiglu", 1, ["--ffn-hidden-size 100", "96 or 104"]),
        ("--swiglu --tensor-model-parallel-size 3", 3, ["--ffn-hidden-size 2048 (default)", "2040 or 2064"]),
        ("--sequence-parallel --tensor-model-parallel-size 3 --seq-length 100", 3, ["--seq-length 100", "99 or 102"]),
        ("--vocab-size 9 --tensor-model-parallel-size 4", 4, ["--vocab-size 9", "--tensor-model-parallel-size 3"]),
        ("--num-distributed-optimizer-instances 2", 4, ["nothing is sharded", "--use-torch-fsdp2"]),
        ("--use-torch-fsdp2 --num-distributed-optimizer-instances 3", 4, ["1, 2 or 4"]),
        ("--use-torch-fsdp2 --data-parallel-sharding-strategy no_shard", 2, ["optim_grads_params"]),
        ("--use-torch-fsdp2 --data-parallel-sharding-strategy optim_grads", 2, ["optim_grads_params"]),
        ("--recompute-activations --recompute-granularity full", 1, ["selective"]),
        ("--context-parallel-size 3", 4, ["--context-parallel-size 3", "start 3 or 6 ranks"]),
        ("--context-parallel-size 4 --seq-length 100", 4, ["--seq-length 100", "multiple of 8", "96 or 104"]),
        ("--context-parallel-size 8 --seq-length 4", 8, ["--context-parallel-size 8", "use --seq-length 16"]),
        (
            "--context-parallel-size 2 --tensor-model-parallel-size 3 --swiglu --ffn-hidden-size 48 "
            "--sequence-parallel --seq-length 18",
            6,
            ["--seq-length 18", "--sequence-parallel", "12 or 24"],
        ),
        ("--context-parallel-size 2 --attention-backend flash4 --bf16", 2, ["FlashAttention-4", "parts of sequences"]),
        ("--context-parallel-size 2 --attention-backend fused", 2, ["--attention-backend fused", "auto"]),
        ("--pipeline-model-parallel-size 16 --global-batch-size 16", 16, ["--num-layers 12", "at most 12 stages"]),
        # batch
        ("--global-batch-size 6 --micro-batch-size 2", 2, ["--global-batch-size 6", "4 or 8"]),
        ("--pipeline-model-parallel-size 4 --global-batch-size 4", 8, ["2 micro-batches", "batches of 8"]),
        ("--rampup-batch-size 3 2 100 --global-batch-size 8 --micro-batch-size 2", 1, ["START 3", "2 or 4"]),
        ("--rampup-batch-size 2 3 100 --global-batch-size 8 --micro-batch-size 2", 1, ["INCREMENT 3", "2 or 4"]),
        ("--rampup-batch-size 16 2 100 --global-batch-size 8", 1, ["START of at most 8"]),
        ("--rampup-batch-size 2 4 100 --global-batch-size 8", 1, ["don't reach 8", "1, 2, 3 or 6"]),
        ("--rampup-batch-size 1 1 9 --global-batch-size 8 --pipeline-model-parallel-size 2", 2, ["ramp"]),
        ("--train-samples 100", 1, ["--train-iters 10", "--train-samples 100"]),
        ("--train-iters None", 1, ["--train-iters", "--train-samples"]),
        ("--train-iters None --train-samples 3 --global-batch-size 4", 1, ["--train-samples 3"]),
        # schedule
        ("--lr-warmup-iters 3 --lr-warmup-fraction 0.1", 1, ["--lr-warmup-fraction 0.1", "--lr-warmup-iters 3"]),
        ("--lr-warmup-iters 11", 1, ["--lr-warmup-iters 11", "10 iters"]),
        ("--lr-warmup-fraction 1", 1, ["--lr-warmup-fraction 1.0"]),
        ("--lr-warmup-samples 11", 1, ["--lr-warmup-samples 11", "--lr-warmup-iters"]),
        ("--train-iters None --train-samples 99 --lr-decay-iters 5", 1, ["--lr-decay-samples"]),
        ("--lr-decay-style WSD", 1, ["--lr-decay-style WSD", "--lr-wsd-decay-iters"]),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 9 --lr-warmup-iters 2", 1, ["at most 8"]),
        ("--lr-decay-style power", 1, ["--lr-decay-style power", "--lr-power-scale"]),
        ("--min-lr 1", 1, ["--min-lr 1.0", "--lr 0.0003"]),
        ("--lr-warmup-init 1 --lr-warmup-iters 2", 1, ["--lr-warmup-init 1.0"]),
        # optimizer
        ("--optimizer dion --dion-rank-fraction 0", 1, ["--dion-rank-fraction 0", "above 0 and at most 1"]),
        ("--optimizer dion --muon-tp-mode distributed", 1, ["--muon-distributed-mode gram", "--optimizer muon"]),
        ("--optimizer muon --muon-split-heads --muon-no-split-qkv", 1, ["--muon-split-heads", "--no-muon-split-qkv"]),
        # parametrization
        ("--depth-alpha 0.7", 1, ["--depth-alpha 0.7", "0.5 and 1"]),
        ("--parametrization completep --mup-ffn-residual-scale 1.4", 1, ["--mup-ffn-residual-scale 1.4", "completep"]),
        ("--parametrization completep --mup-attention-residual-scale 1.4", 1, ["--mup-attention-residual-scale 1.4"]),
        ("--softmax-scale 0.1 --mup-attention-mult 2", 1, ["--softmax-scale 0.1", "--mup-attention-mult 2.0"]),
        # data
        ("--data-path a", 1, ["--mock-data", "--data-path a"]),
        ("--no-mock-data", 1, ["--data-path", "--mock-data"]),
        ("--no-mock-data --data-path a --train-data-path b", 1, ["--train-data-path b"]),
        ("--no-mock-data --valid-data-path b", 1, ["--train-data-path"]),
        ("--no-mock-data --data-path 0.3 a b", 1, ["--data-path 0.3 a b", "in turn"]),
        ("--no-mock-data --data-path 1", 1, ["./1"]),
        ("--no-mock-data --data-path -1 a", 1, ["-1", "above 0"]),
        ("--no-mock-data --data-path nan a", 1, ["above 0"]),
        ("--no-mock-data --data-path a --eval-interval 3 --split 1,0,0", 1, ["--split 1,0,0"]),
        ("--no-mock-data --train-data-path a --eval-interval 3", 1, ["--valid-data-path"]),
        *[(f"--split {text}", 1, [text]) for text in ("1,x", "0,1,1", "-1,2", "1,2,3,4", "nan,1", ",", "inf")],
        ("--vocab-size None", 1, ["--vocab-size", "--tokenizer-type"]),
        ("--tokenizer-type NullTokenizer --vocab-size None", 1, ["--vocab-size"]),
        ("--tokenizer-type SentencePieceTokenizer", 1, ["--tokenizer-model"]),
        ("--tokenizer-model t.model", 1, ["--tokenizer-type"]),
        ("--tokenizer-type NullTokenizer --tokenizer-model t", 1, ["has no model"]),
        ("--eod-token-id 256", 1, ["--eod-token-id 256", "at most 255"]),
        ("--eod-mask-loss", 1, ["--eod-mask-loss", "--eod-token-id"]),
        # checkpoint
        ("--save-interval 5", 1, ["--save-interval 5", "--save"]),
        ("--ckpt-step 5", 1, ["--ckpt-step 5", "--load"]),
        ("--finetune", 1, ["--finetune", "--load"]),
        ("--save=", 1, ["--save ''"]),
        ("", 0, ["world size 0"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told(argv, world_size, parts):
    error = refused(" ".join([*GOOD, argv]), world_size)
    assert [part for part in parts if part not in str(error)] == []
    assert error.what
    assert error.why
    assert error.fix


@pytest.mark.parametrize(
    ("argv", "flag", "why"),
    [
        ("--num-distributed-optimizer-instances 1", "--num-distributed-optimizer-instances 1", "sharded"),
        ("--position-embedding-type none --rotary-base 5", "--rotary-base 5.0", "none"),
        ("--max-position-embeddings 2048", "--max-position-embeddings 2048", "learned_absolute"),
        ("--muon-momentum 0.95", "--muon-momentum 0.95", "adam"),
        ("--optimizer muon --no-muon-split-fc1", "--no-muon-split-fc1", "gate"),
        ("--optimizer muon --optimizer-switch-at 9999", "--optimizer muon", "ends before --optimizer-switch-at 9999"),
        ("--optimizer scion --weight-decay 0.2", "--weight-decay 0.2", "balls"),
        ("--optimizer spectral_sphere --weight-decay 0.2", "--weight-decay 0.2", "hard retraction"),
        ("--optimizer muon --scalar-optimizer lion --adam-eps 1e-9", "--adam-eps 1e-09", "lion"),
        ("--optimizer muon --muon-distributed-mode gram", "--muon-distributed-mode gram", "parts of a matrix"),
        ("--lr-wsd-decay-iters 3", "--lr-wsd-decay-iters 3", "cosine"),
        ("--lr-power-exponent -1", "--lr-power-exponent -1.0", "cosine"),
        ("--lr-decay-style constant --min-lr 1e-5", "--min-lr 1e-05", "constant"),
        ("--lr-warmup-init 1e-5", "--lr-warmup-init 1e-05", "no warm-up"),
        ("--mup-base-hidden-size 64", "--mup-base-hidden-size 64", "standard"),
        ("--parametrization mup", "--parametrization mup", "ratios are 1"),
        ("--use-mup --mup-base-width 64 --base-num-layers 2", "--base-num-layers 2", "CompleteP"),
        ("--recompute-num-layers 2", "--recompute-num-layers 2", "full"),
        ("--sequence-parallel", "--sequence-parallel", "size is 1"),
        ("--account-for-loss-in-pipeline-split", "--account-for-loss-in-pipeline-split", "one stage"),
        ("--use-torch-fsdp2", "--use-torch-fsdp2", "one data-parallel rank"),
        ("--main-params-dtype bf16", "--main-params-dtype bf16", "--bf16"),
        ("--split 1,1,1", "--split 1,1,1", "--data-path"),
        ("--add-qkv-bias", "--add-qkv-bias", "biases"),
        ("--output-layer-init-method-std 0", "--output-layer-init-method-std 0.0", "tied"),
        ("--no-decay-output-layer", "--no-decay-output-layer", "tied"),
        ("--eval-iters 5", "--eval-iters 5", "--eval-interval"),
        ("--keep-last 2", "--keep-last 2", "--save"),
        ("--no-load-rng", "--no-load-rng", "--load"),
        ("--wandb-exp-name x", "--wandb-exp-name x", "--wandb-project"),
    ],
)
def test_a_flag_without_effect_is_a_warning(argv, flag, why):
    (warning,) = warnings(*argv.split())
    assert warning.startswith(f"{flag} changes nothing")
    assert why in warning


EXPERTS = "--num-experts 4 --disable-bias-linear"


@pytest.mark.parametrize(
    ("argv", "world_size"),
    [
        ("--optimizer scion --weight-decay 0.2 --optimizer-switch-at 5", 1),
        ("--optimizer muon --scalar-optimizer lion --adam-beta1 0.8 --adam-eps 1e-9 --optimizer-switch-at 5", 1),
        ("--optimizer muon --scalar-optimizer lion --exp-avg-dtype bf16 --optimizer-switch-at 5", 1),
        ("--optimizer muon --muon-distributed-mode gram --use-torch-fsdp2", 2),
        (f"--optimizer scion --weight-decay 0.2 {EXPERTS}", 1),
        (f"--optimizer muonsphere --weight-decay 0.2 {EXPERTS}", 1),
        ("--optimizer muonsphere --weight-decay 0.2 --untie-embeddings-and-output-weights", 1),
        ("--optimizer muonsphere --weight-decay 0.2 --sphere-retraction dynamic", 1),
    ],
)
def test_a_flag_that_acts_for_a_while_or_on_some_ranks_is_no_warning(argv, world_size):
    assert warnings(*argv.split(), world_size=world_size) == []


def test_split_with_paths_per_split_warns():
    (warning,) = check(f"{EXACT} --train-data-path a --split 1,0,0")
    assert "--split" in warning


def test_every_number_has_a_range_and_nothing_else():
    numeric = {s.name for s in settings().values() if s.item in (int, float) and s.kind != "choice"}
    assert set(BOUNDS) == numeric


@pytest.mark.parametrize("name", BOUNDS)
def test_numbers_outside_their_range(name):
    setting, bound, base = settings()[name], BOUNDS[name], build()
    outside = [float("nan"), float("inf"), -float("inf")] if setting.item is float else [10**400, -(10**400)]
    if bound.low > -1e300:
        outside += [setting.item(bound.low) if bound.above else setting.item(bound.low) - 1]
    if bound.high < 1e300:
        outside += [setting.item(bound.high) if bound.below else setting.item(bound.high) + setting.item(1)]
    for value in outside:
        given = (8, value, 8) if setting.kind == "tuple" else value
        with pytest.raises(ConfigError, match=setting.flag) as caught:
            validate(with_value(base, name, given), 1)
        assert "must be" in caught.value.why


def test_values_of_another_type():
    for name, value in [
        ("lr", "x"),
        ("num_layers", 1.5),
        ("swiglu", 1),
        ("save", 3),
        ("data_path", "a"),
        ("seed", True),
    ]:
        with pytest.raises(ConfigError, match=name):
            validate(with_value(build(), name, value), 1)


def test_world_size_and_heads_are_checked_before_anything_runs():
    assert validate(build("--tensor-model-parallel-size", "2"), 2) == []


def test_vocabulary_rows():
    for tp in range(1, 12):
        for size in range(1, 40):
            rows = -(-size // tp)
            full = all(size > rows * rank for rank in range(tp))
            if full:
                check_vocab_size(size, tp)
            else:
                with pytest.raises(ConfigError):
                    check_vocab_size(size, tp)


# Paths


def paths(*argv: str) -> Config:
    return build(*argv, good=False)


def test_paths_that_can_be_written_leave_no_trace(tmp_path):
    save, log = tmp_path / "new" / "save", tmp_path / "log" / "m.jsonl"
    check_paths(paths("--save", str(save), "--tensorboard-dir", str(tmp_path), "--metrics-file", str(log)))
    assert save.is_dir()
    assert list(save.iterdir()) == []
    assert not log.exists()


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir", "--wandb-save-dir", "--data-cache-path"])
def test_a_folder_that_cannot_be_written(tmp_path, flag):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing", "a\0b"):
        with pytest.raises(ConfigError, match="can't be written") as caught:
            check_paths(paths(flag, str(path)))
        assert caught.value.what.startswith(flag)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        check_paths(paths("--save", str(tmp_path)))


def test_a_metrics_file_that_is_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        check_paths(paths("--metrics-file", str(tmp_path)))


def test_loading(tmp_path):
    missing, full, file = tmp_path / "missing", tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "iter").write_text("")
    file.write_text("")
    check_paths(paths("--load", str(missing)))
    assert not missing.exists()
    for flags in (["--exit-on-missing-checkpoint"], ["--finetune"], ["--ckpt-step", "3"]):
        check_paths(paths("--load", str(full), *flags))
        with pytest.raises(ConfigError, match="missing or empty"):
            check_paths(paths("--load", str(missing), *flags))
    with pytest.raises(ConfigError, match="is a file"):
        check_paths(paths("--load", str(file)))


def test_data_files(tmp_path):
    prefix = str(tmp_path / "corpus")
    for end in (".bin", ".idx"):
        with pytest.raises(ConfigError, match=r"no file .*corpus\.(bin|idx)"):
            check_paths(paths("--data-path", "0.5", prefix))
        (tmp_path / f"corpus{end}").write_text("")
    check_paths(paths("--data-path", "0.5", prefix, "0.5", prefix))
    check_paths(paths("--train-data-path", prefix))
    with pytest.raises(ConfigError, match=r"drop the ending: .*corpus$"):
        check_paths(paths("--data-path", f"{prefix}.bin"))
    with pytest.raises(ConfigError, match="tokenizer-model"):
        check_paths(paths("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", prefix))
