"""What cannot work: contradicting settings and impossible layouts. Ranges of single numbers are in ``bounds``."""

from __future__ import annotations

import math

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import as_number, choices, divisors, multiples, settings, told, value_of
from megatron_mup.config.pipeline import stage_layers
from megatron_mup.config.scheme_rules import check_horizon, check_rule_of_optimizer, check_scheme


def check_model(config: Config) -> None:
    """Sizes of heads, MLP and positions among themselves."""
    model, seq_length = config.model, config.training.seq_length
    heads, groups = model.num_attention_heads, model.query_groups
    if model.multi_latent_attention:
        _check_latent_attention(config)
    elif model.kv_channels is None and model.hidden_size % heads:
        raise ConfigError(
            told(config, "hidden_size", "num_attention_heads"),
            f"{model.hidden_size} channels don't divide by {heads} heads",
            f"use --hidden-size {multiples(model.hidden_size, heads)}, or set the head width with --kv-channels",
        )
    if heads % groups:
        raise ConfigError(
            told(config, "num_attention_heads", "num_query_groups"),
            f"{heads} query heads don't divide by {groups} key/value heads",
            f"use --num-query-groups {choices(divisors(heads))}",
        )
    if model.position_embedding_type == "rope" and (model.rotary_dim < 2 or model.rotary_dim % 2):
        if model.multi_latent_attention:
            raise ConfigError(
                told(config, "qk_pos_emb_head_dim"),
                "rope rotates pairs of channels",
                f"use --qk-pos-emb-head-dim {multiples(model.qk_pos_emb_head_dim, 2)}",
            )
        raise ConfigError(
            f"{told(config, 'rotary_percent')} with {model.head_dim} channels per head",
            f"rope rotates pairs of channels, but {model.rotary_dim} would be rotated",
            "use an even --kv-channels, and a --rotary-percent that leaves an even number of them",
        )
    if model.max_position_embeddings is not None and model.max_position_embeddings < seq_length:
        raise ConfigError(
            told(config, "max_position_embeddings", "seq_length"),
            "sequences are longer than the positions that the model has",
            f"use --max-position-embeddings {seq_length}, or a shorter --seq-length",
        )
    if model.swiglu and model.squared_relu:
        raise ConfigError("--swiglu, --squared-relu", "an MLP has one activation", "drop one of them")


def _check_latent_attention(config: Config) -> None:
    model = config.model
    if model.kv_lora_rank is None:
        raise ConfigError(
            "--multi-latent-attention",
            "nothing says how wide the latent of keys and values is",
            "give --kv-lora-rank, for example 512",
        )
    if model.query_groups != model.num_attention_heads:
        raise ConfigError(
            told(config, "multi_latent_attention", "num_query_groups"),
            "each query head has a key and a value of its own out of the latent",
            "drop --num-query-groups",
        )
    for name, fix in (
        ("kv_channels", "use --qk-head-dim, --qk-pos-emb-head-dim and --v-head-dim"),
        ("add_qkv_bias", "drop it: these projections have no biases"),
    ):
        if value_of(config, name):
            raise ConfigError(told(config, "multi_latent_attention", name), "latent attention doesn't have it", fix)


def check_layout(config: Config, world_size: int) -> None:
    """Ranks, and what is cut over them."""
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size < 1:
        raise ConfigError(f"world size {world_size}", "a run has at least one rank", "start it with torchrun")
    cp, together = parallel.context_parallel_size, parallel.model_parallel_size
    if world_size % together:
        names = ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
        raise ConfigError(
            told(config, *names, *(["context_parallel_size"] if cp > 1 else [])),
            f"{' x '.join(map(str, [tp, pp] if cp == 1 else [tp, pp, cp]))} = {together} ranks work on the same "
            f"samples, but {world_size} is no multiple of it",
            f"start {multiples(world_size, together)} ranks, or choose sizes with a product of "
            f"{choices(divisors(world_size))}",
        )
    if model.num_attention_heads % tp:
        raise _not_by_tp(config, "num_attention_heads", model.num_attention_heads, "query heads")
    if model.query_groups % tp:
        raise _not_by_tp(config, "num_query_groups", model.query_groups, "key/value heads")
    _check_ffn(config, tp)
    if parallel.sequence_parallel and config.training.seq_length % tp:
        raise _not_by_tp(config, "seq_length", config.training.seq_length, "tokens, with --sequence-parallel,")
    if model.vocab_size is not None:
        check_vocab_size(model.vocab_size, tp)
    stage_layers(config)
    _check_sharding(config, world_size)


def check_vocab_size(vocab_size: int, tp: int) -> None:
    """Every tensor-parallel rank holds rows of the embedding; also for a size that only the tokenizer knows.

    Raises:
        ConfigError: ranks would stay empty.
    """
    rows = math.ceil(vocab_size / tp)
    if rows * (tp - 1) >= vocab_size:
        fitting = [n for n in range(1, tp) if math.ceil(vocab_size / n) * (n - 1) < vocab_size]
        raise ConfigError(
            f"--vocab-size {vocab_size}, --tensor-model-parallel-size {tp}",
            f"each rank takes {rows} rows of the vocabulary, which leaves nothing for the last",
            f"use --tensor-model-parallel-size {fitting[-1]}, or a larger vocabulary",
        )


def _check_ffn(config: Config, tp: int) -> None:
    """Rows of gate and up alternate in runs of eight, so that a shard holds both sides of its channels."""
    model = config.model
    unit = 8 * tp if model.swiglu else tp
    if model.ffn_size % unit:
        told_size = settings()["ffn_hidden_size"].shown(model.ffn_size)
        size = f"{told_size}{' (default)' if model.ffn_hidden_size is None else ''}"
        raise ConfigError(
            f"{size}, {told(config, 'tensor_model_parallel_size')}",
            f"the MLP's width must be a multiple of {unit}"
            + (" (8 x tensor-parallel size) with --swiglu" if model.swiglu else ""),
            f"use --ffn-hidden-size {multiples(model.ffn_size, unit)}",
        )


def _check_sharding(config: Config, world_size: int) -> None:
    parallel, dp = config.parallel, config.sharding_size(world_size)
    instances = parallel.num_distributed_optimizer_instances
    if instances == 1:
        return
    if parallel.sharding == "no_shard":
        raise ConfigError(
            told(config, "num_distributed_optimizer_instances"),
            "nothing is sharded over data-parallel ranks, so there is nothing to replicate",
            "add --data-parallel-sharding-strategy optim_grads (or --use-torch-fsdp2), or drop it",
        )
    if dp % instances:
        raise ConfigError(
            told(config, "num_distributed_optimizer_instances"),
            f"{dp} data-parallel ranks{' (times context-parallel)' * (parallel.context_parallel_size > 1)} don't "
            f"divide by {instances}",
            f"use {choices(divisors(dp))}",
        )


def check_spellings(config: Config, explicit: frozenset[str]) -> None:
    """Switches that repeat another setting must agree with it where both are given."""
    parallel, training = config.parallel, config.training
    strategy = parallel.data_parallel_sharding_strategy if "data_parallel_sharding_strategy" in explicit else None
    for switch, on, means in (
        ("use_torch_fsdp2", parallel.use_torch_fsdp2, "optim_grads_params"),
        ("use_distributed_optimizer", parallel.use_distributed_optimizer, "optim_grads"),
    ):
        # FSDP2 shards what the distributed optimizer shards, and more.
        wider = switch == "use_distributed_optimizer" and strategy == "optim_grads_params"
        if on and strategy not in (None, means) and not wider:
            raise _contradiction(config, switch, "data_parallel_sharding_strategy", f"it means {means}")
    granularity = training.recompute_granularity if "recompute_granularity" in explicit else None
    if training.recompute_activations and granularity not in (None, "selective"):
        raise _contradiction(config, "recompute_activations", "recompute_granularity", "it means selective")


def check_batch(config: Config, world_size: int) -> None:
    """Batch sizes and the length of the run."""
    training = config.training
    micro, dp = training.micro_batch_size, config.data_parallel_size(world_size)
    stages, step = config.parallel.pipeline_model_parallel_size, micro * dp
    batch = config.global_batch_size(world_size)
    unit = f"{micro} (micro-batch) x {dp} (data-parallel ranks) = {step}"
    if batch % step:
        raise ConfigError(
            told(config, "global_batch_size"),
            f"must be a multiple of {unit}",
            f"use --global-batch-size {multiples(batch, step)}, or another --micro-batch-size",
        )
    smallest, flag = batch, "global_batch_size"
    if training.rampup_batch_size is not None:
        _check_rampup(config, batch, step, unit)
        smallest, flag = training.rampup_batch_size[0], "rampup_batch_size"
    if smallest // step < stages:
        raise ConfigError(
            told(config, flag, "pipeline_model_parallel_size"),
            f"a step has {smallest // step} micro-batches per rank; the pipeline needs one per stage at least",
            f"use batches of {stages * step} or more ({unit}), or fewer stages",
        )
    if training.train_iters is not None and training.train_samples is not None:
        raise ConfigError(told(config, "train_iters", "train_samples"), "both say how long the run is", "drop one")
    if training.train_iters is None and training.train_samples is None:
        raise ConfigError("--train-iters", "nothing says how long the run is", "give --train-iters or --train-samples")
    if training.train_samples is not None and training.train_samples < smallest:
        raise ConfigError(
            told(config, "train_samples"), f"less than one step of {smallest} samples", f"use {smallest} or more"
        )


def _check_rampup(config: Config, batch: int, step: int, unit: str) -> None:
    rampup = config.training.rampup_batch_size
    assert rampup is not None
    start, increment, _ = rampup
    shown = f"{told(config, 'rampup_batch_size')}, --global-batch-size {batch}"
    for name, value in (("START", start), ("INCREMENT", increment)):
        if value % step:
            raise ConfigError(shown, f"{name} {value} must be a multiple of {unit}", f"use {multiples(value, step)}")
    if start > batch:
        raise ConfigError(shown, "it starts above the global batch", f"use a START of at most {batch}")
    if (batch - start) % increment:
        raise ConfigError(
            shown,
            f"steps of {increment} from {start} don't reach {batch}",
            f"use an INCREMENT of {choices([d for d in divisors(batch - start) if d % step == 0])}",
        )


def check_schedule(config: Config) -> None:
    """Lengths of the schedule in the run's unit, and its rates."""
    schedule, optimizer, training = config.schedule, config.optimizer, config.training
    unit, other = ("samples", "iters") if training.train_samples is not None else ("iters", "samples")
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        if getattr(schedule, f"{name}_{other}"):
            raise ConfigError(
                told(config, f"{name}_{other}"),
                f"the run is given in --train-{unit}",
                f"use {settings()[f'{name}_{unit}'].flag}, or give the run in --train-{other}",
            )
    warmup = getattr(schedule, f"lr_warmup_{unit}")
    if schedule.lr_warmup_fraction is not None and warmup:
        raise _contradiction(config, "lr_warmup_fraction", f"lr_warmup_{unit}", "both say how long warm-up is")
    length = getattr(schedule, f"lr_decay_{unit}") or getattr(training, f"train_{unit}")
    if schedule.lr_warmup_fraction is not None:
        warmup = schedule.lr_warmup_fraction * length
    if warmup >= length:
        name = f"lr_warmup_{unit}" if schedule.lr_warmup_fraction is None else "lr_warmup_fraction"
        raise ConfigError(
            told(config, name),
            f"the schedule is over after {length} {unit}, before warm-up ends",
            f"shorten warm-up, or lengthen --lr-decay-{unit}",
        )
    _check_tail(config, unit, length, warmup)
    for name, value in (("min_lr", optimizer.min_lr), ("lr_warmup_init", schedule.lr_warmup_init)):
        if value > optimizer.lr:
            raise ConfigError(told(config, name, "lr"), "it is above the peak", f"use at most {optimizer.lr:g}")


def _check_tail(config: Config, unit: str, length: int, warmup: float) -> None:
    schedule = config.schedule
    tail, flag = getattr(schedule, f"lr_wsd_decay_{unit}"), f"--lr-wsd-decay-{unit}"
    if schedule.lr_decay_style == "WSD" and tail is None:
        raise ConfigError(
            told(config, "lr_decay_style"),
            "nothing says how long its last part is",
            f"give {flag}, for example {max(1, round((length - warmup) / 10))}",
        )
    if schedule.lr_decay_style in ("WSD", "power") and tail is not None and tail > length - warmup:
        raise ConfigError(
            told(config, f"lr_wsd_decay_{unit}"),
            f"only {length - warmup:g} of {length} {unit} are left after warm-up",
            f"use at most {math.floor(length - warmup)}",
        )
    if schedule.lr_decay_style == "power" and not warmup and schedule.lr_power_scale is None:
        raise ConfigError(
            told(config, "lr_decay_style"),
            "without warm-up nothing says where the curve leaves the peak",
            f"give --lr-warmup-{unit} or --lr-power-scale",
        )


def check_parametrization(config: Config) -> None:
    """Multipliers that fight over one place, and what the parametrization has no rule for."""
    rules, model = config.parametrization, config.model
    if rules.depth_alpha not in (0.5, 1.0):
        raise ConfigError(told(config, "depth_alpha"), "the rules are known for 0.5 and 1", "use one of them")
    if model.softmax_scale is not None and rules.mup_attention_mult != 1:
        raise _contradiction(config, "softmax_scale", "mup_attention_mult", "--softmax-scale is the whole factor")
    check_scheme(config)
    check_rule_of_optimizer(config)
    check_horizon(config)


def check_optimizer(config: Config) -> None:
    """Settings of optimizers among themselves."""
    flags = config.optimizer
    if flags.muon_split_heads and not flags.muon_split_qkv:
        raise _contradiction(config, "muon_split_heads", "muon_split_qkv", "heads are parts of query, key and value")
    if flags.optimizer_switch_at is not None and flags.optimizer == "adam":
        raise ConfigError(
            told(config, "optimizer_switch_at", "optimizer"),
            "AdamW comes before the switch; nothing is named that comes after it",
            "add --optimizer muon (or another), or drop --optimizer-switch-at",
        )
    if flags.optimizer_switch_carry_state and flags.optimizer == "dion":
        raise ConfigError(
            told(config, "optimizer_switch_carry_state", "optimizer"),
            "Dion's momentum is a sum of what its updates have left over, which AdamW has no counterpart of",
            "drop --optimizer-switch-carry-state",
        )
    if flags.muon_distributed_mode != "owner" and flags.optimizer not in ("adam", "muon"):
        raise ConfigError(
            told(config, "muon_distributed_mode", "optimizer"),
            "only muon's rule is known without whole matrices",
            "use --muon-distributed-mode owner, or --optimizer muon",
        )
    in_bf16 = {
        "main_params_dtype": config.training.bf16 and config.training.main_params_dtype == "bf16",
        "exp_avg_dtype": flags.exp_avg_dtype == "bf16",
        "exp_avg_sq_dtype": flags.exp_avg_sq_dtype == "bf16",
    }
    if flags.adam_impl != "native" and any(in_bf16.values()):
        raise ConfigError(
            told(config, "adam_impl", *(name for name, narrow in in_bf16.items() if narrow)),
            "its kernel keeps weights and both moments in fp32",
            "keep all of them in fp32, or use --adam-impl native",
        )
    if flags.optimizer == "dion" and flags.dion_compressed_sync:
        _check_compressed_sync(config)
    if flags.optimizer == "spectral_sphere" and flags.coefficient_type == "squaring":
        raise ConfigError(
            told(config, "optimizer", "muon_coefficient_type"),
            "the tangent direction is sought among the iterates of small steps",
            "drop --muon-coefficient-type, or name another set",
        )
    sphere = flags.optimizer in ("muonsphere", "spectral_sphere")
    if sphere and flags.sphere_retraction == "dynamic" and flags.weight_decay == 0:
        raise _contradiction(
            config, "sphere_retraction", "weight_decay", "dynamic retraction is as strong as the weight decay"
        )


def _check_compressed_sync(config: Config) -> None:
    flags, parallel = config.optimizer, config.parallel
    if flags.clip_grad > 0:
        raise ConfigError(
            told(config, "dion_compressed_sync", "clip_grad"),
            "replicas don't sum the gradients of hidden matrices, so nobody knows the norm to clip by",
            "use --clip-grad 0, or drop --dion-compressed-sync",
        )
    if flags.optimizer_switch_at is not None:
        raise ConfigError(
            told(config, "dion_compressed_sync", "optimizer_switch_at"),
            "AdamW needs the sums of gradients that replicas would keep apart",
            "drop one of them",
        )
    if parallel.sharding != "no_shard" and parallel.num_distributed_optimizer_instances == 1:
        raise ConfigError(
            told(config, "dion_compressed_sync", "num_distributed_optimizer_instances"),
            f"{parallel.sharding} in one instance shards weights' gradients over all data-parallel ranks: no replicas",
            "use --data-parallel-sharding-strategy no_shard, more instances, or drop --dion-compressed-sync",
        )


def check_cuda_graph(config: Config, world_size: int) -> None:
    """What a graph of forward and backward can't hold, because it is another one in each step, or asks the host."""
    if config.training.cuda_graph_impl == "none":
        return
    dropout, parallel = config.model.hidden_dropout or config.model.attention_dropout, config.parallel
    sharded = parallel.sharding in ("optim_grads", "optim_grads_params") and parallel.model_parallel_size == 1
    sharded = sharded and parallel.num_distributed_optimizer_instances == 1 and config.fp8.fp8_format is None
    for names, wrong, why in (
        (
            (),
            world_size > 1 and not sharded,
            f"there are {world_size} ranks, and only messages of --use-torch-fsdp2 or --use-distributed-optimizer, "
            "alone, in one instance and without FP8, are captured",
        ),
        (("num_experts",), config.moe.num_experts is not None, "how many tokens an expert gets is known on the device"),
        (("hidden_dropout", "attention_dropout"), dropout, "its keys come from the host"),
        (("diagnostics_interval",), config.logging.diagnostics_interval is not None, "a diagnosis looks inside"),
        (("distributed_engine",), config.parallel.distributed_engine != "native", "the engine has a step of its own"),
    ):
        if wrong:
            raise ConfigError(told(config, "cuda_graph_impl", *names), why, "drop --cuda-graph-impl")


def check_kernels(config: Config) -> None:
    """Attention kernels and what they lack; one way to recompute at a time."""
    training = config.training
    if training.recompute != "none" and training.torch_compile and training.activation_memory_budget < 1:
        recompute = "recompute_activations" if training.recompute_activations else "recompute_granularity"
        raise _contradiction(config, recompute, "activation_memory_budget", "both say what is recomputed")
    backend, dropout = training.attention_backend, config.model.attention_dropout
    if backend == "flash4" and not training.bf16:
        raise ConfigError(told(config, "attention_backend"), "FlashAttention-4 has no kernel for fp32", "add --bf16")
    if backend in ("flash", "flash4", "fused") and dropout > 0:
        raise ConfigError(
            told(config, "attention_backend", "attention_dropout"),
            "its dropout would depend on the layout, so dropout runs unfused only",
            "use --attention-backend auto, or --attention-dropout 0",
        )
    if backend in ("flash", "flash4") and config.data.reset_attention_mask:
        raise ConfigError(
            told(config, "attention_backend", "reset_attention_mask"),
            "FlashAttention takes no mask of documents",
            "use --attention-backend auto",
        )
    if backend in ("flash", "flash4") and config.model.value_dim != config.model.head_dim:
        raise ConfigError(
            told(config, "attention_backend", "v_head_dim"),
            f"FlashAttention here takes one width for all heads, but queries have {config.model.head_dim}",
            "use --attention-backend auto",
        )
    if backend == "flash4" and (config.model.head_dim % 8 or config.model.head_dim > 256):
        raise ConfigError(
            told(config, "attention_backend"),
            f"FlashAttention-4 takes heads of 8, 16, ... 256 channels, not {config.model.head_dim}",
            "use --attention-backend auto",
        )
    if backend in ("flash", "flash4") and config.model.window_size is not None:
        raise ConfigError(
            told(config, "attention_backend", "window_size"),
            "FlashAttention takes no window here",
            "use --attention-backend auto",
        )


def check_data(config: Config) -> None:
    """Where tokens come from and what they mean."""
    data = config.data
    paths = [n for n in ("data_path", "train_data_path", "valid_data_path", "test_data_path") if getattr(data, n)]
    if data.mock_data and paths:
        raise _contradiction(config, "mock_data", paths[0], "both say where tokens come from")
    if not data.mock_data and not paths:
        raise ConfigError("--data-path", "there is no data", "give --data-path PREFIX, or --mock-data to try without")
    if data.data_path and len(paths) > 1:
        raise _contradiction(config, "data_path", paths[1], "--data-path is all splits")
    if paths and not data.data_path and not data.train_data_path:
        raise ConfigError(told(config, paths[0]), "there is no training data", "give --train-data-path too")
    for name in paths:
        _check_blend(config, name)
    shares = _split(config)
    if config.training.evaluation_interval is not None and not data.mock_data:
        if data.train_data_path and not data.valid_data_path:
            raise ConfigError(
                told(config, "eval_interval"), "there is no validation data", "give --valid-data-path, or drop it"
            )
        if data.data_path and not shares[1]:
            raise ConfigError(
                told(config, "eval_interval", "split"), "validation has no share", "use --split 969,30,1, for example"
            )
    _check_tokens(config)


def _check_blend(config: Config, name: str) -> None:
    """Prefixes only, or weights and prefixes in turn."""
    words = getattr(config.data, name)
    weights = [as_number(word) for word in words]
    if all(weight is None for weight in weights):
        if any(not word.strip() for word in words):
            raise ConfigError(told(config, name), "a prefix is empty", "give the path without .bin or .idx")
        return
    in_turn = len(words) % 2 == 0 and all((weight is None) == bool(i % 2) for i, weight in enumerate(weights))
    if not in_turn:
        raise ConfigError(
            told(config, name),
            "weights and prefixes must come in turn",
            f"write {settings()[name].flag} 0.7 first 0.3 second; a prefix that is a number as ./1",
        )
    for weight in weights[::2]:
        if weight is None or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(told(config, name), f"weight {weight} is not positive", "give weights above 0")


def _split(config: Config) -> list[float]:
    """The three shares of --split."""
    shares = [as_number(part) for part in config.data.split.split(",")]
    good = [share for share in shares if share is not None and math.isfinite(share) and share >= 0]
    if len(good) != len(shares) or len(shares) > 3 or not good[0]:
        raise ConfigError(
            told(config, "split"),
            "takes up to three shares for training, validation and test, none negative, training's above 0",
            "use --split 969,30,1, for example",
        )
    return [*good, 0.0, 0.0][:3]


def _check_tokens(config: Config) -> None:
    data, vocab_size = config.data, config.model.vocab_size
    if data.tokenizer_type not in (None, "NullTokenizer") and data.tokenizer_model is None:
        raise ConfigError(told(config, "tokenizer_type"), "it has no model", "give --tokenizer-model FILE")
    if data.tokenizer_model is not None and data.tokenizer_type in (None, "NullTokenizer"):
        raise ConfigError(
            told(config, "tokenizer_model"),
            "nothing says what kind of tokenizer it is"
            if data.tokenizer_type is None
            else "NullTokenizer has no model",
            "give --tokenizer-type SentencePieceTokenizer, for example, or drop it",
        )
    if data.tokenizer_type in (None, "NullTokenizer") and vocab_size is None:
        raise ConfigError(
            "--vocab-size", "nothing says how many token ids there are", "give --vocab-size, or a --tokenizer-type"
        )
    if data.eod_token_id is not None and vocab_size is not None and data.eod_token_id >= vocab_size:
        raise ConfigError(
            told(config, "eod_token_id", "vocab_size"),
            "the id is not in the vocabulary",
            f"use at most {vocab_size - 1}",
        )
    for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        if getattr(data, name) and data.eod_token_id is None and data.tokenizer_type is None:
            raise ConfigError(
                told(config, name), "nothing says which token ends a document", "give --eod-token-id or a tokenizer"
            )


def check_checkpoint(config: Config) -> None:
    """What is saved and loaded."""
    checkpoint = config.checkpoint
    for name, needs in (
        ("save_interval", "save"),
        ("non_persistent_save_interval", "save"),
        ("ckpt_step", "load"),
        ("finetune", "load"),
    ):
        if name == "finetune" and checkpoint.pretrained_checkpoint is not None:
            continue
        if getattr(checkpoint, name) not in (None, False) and getattr(checkpoint, needs) is None:
            raise ConfigError(told(config, name), f"there is no --{needs} folder", f"give --{needs} FOLDER, or drop it")
    is_local = checkpoint.non_persistent_ckpt_type == "local"
    if is_local and checkpoint.non_persistent_local_ckpt_dir is None:
        raise ConfigError(
            told(config, "non_persistent_ckpt_type"),
            "nothing says where each node's own disk is",
            "give --non-persistent-local-ckpt-dir FOLDER",
        )
    for name in ("save", "load", "pretrained_checkpoint", "non_persistent_local_ckpt_dir"):
        if getattr(checkpoint, name) == "":
            flag = settings()[name].flag
            raise ConfigError(f"{flag} ''", "an empty path is no folder", f"give {flag} FOLDER, or drop it")


def check_logging(config: Config, world_size: int) -> None:
    """Steps and ranks of the profile, and what the report is made from."""
    logging = config.logging
    if logging.profile_step_start > logging.profile_step_end:
        raise ConfigError(
            told(config, "profile_step_start", "profile_step_end"),
            "the trace would end before it begins",
            f"use --profile-step-end {logging.profile_step_start} or more",
        )
    beyond = [rank for rank in logging.profile_ranks if rank >= world_size]
    if logging.profile and beyond:
        raise ConfigError(
            told(config, "profile_ranks"), f"there are {world_size} ranks, from 0 on", "name ranks that there are"
        )
    if config.logging.html_report is not None and config.logging.metrics_file is None:
        raise ConfigError(
            told(config, "html_report"), "the page shows what --metrics-file records", "give --metrics-file FILE too"
        )


def _not_by_tp(config: Config, name: str, value: int, things: str) -> ConfigError:
    tp = config.parallel.tensor_model_parallel_size
    return ConfigError(
        f"{settings()[name].shown(value)}, {told(config, 'tensor_model_parallel_size')}",
        f"{value} {things} don't divide by {tp} tensor-parallel ranks",
        f"use {settings()[name].flag} {multiples(value, tp)}, or --tensor-model-parallel-size "
        f"{choices(divisors(value))}",
    )


def _contradiction(config: Config, one: str, two: str, why: str) -> ConfigError:
    return ConfigError(told(config, one, two), f"contradict each other: {why}", "drop one of them")
