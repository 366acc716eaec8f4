"""Settings that the user gave and that change nothing in this run."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_mup.config import scheme_rules
from megatron_mup.config.config import Config
from megatron_mup.config.fields import settings, told


def unused(config: Config, world_size: int, explicit: frozenset[str]) -> list[str]:
    """One sentence for each such setting."""
    why: dict[str, str] = {}
    for names, idle, reason in _rules(config, world_size):
        if idle:
            why |= {name: reason for name in names if name in explicit and name not in why}
    return [f"{told(config, name)} changes nothing: {why[name]}" for name in settings() if name in why]


def _names(*prefixes: str) -> list[str]:
    """All settings whose names start so."""
    return [name for name in settings() if name.startswith(prefixes)]


def _rules(config: Config, world_size: int) -> Iterable[tuple[list[str], bool, str]]:
    """Settings, whether they are idle, and why."""
    yield from _model(config)
    yield from _experts(config)
    yield from _learning(config)
    yield from _layout(config, world_size)
    yield from _run(config)


def _model(config: Config) -> Iterable[tuple[list[str], bool, str]]:
    model = config.model
    kind = model.position_embedding_type
    rotary = ["rotary_base", "rotary_percent", "use_rope_scaling", "rope_scaling_factor"]
    yield rotary, kind != "rope", f"positions are {kind}, not rope"
    yield ["rope_scaling_factor"], not model.use_rope_scaling, "there is no --use-rope-scaling"
    wide = model.window_size is not None and model.window_size >= config.training.seq_length - 1
    yield ["window_size"], wide, "the window is as long as the sequence"
    table = "only --position-embedding-type learned_absolute has a position table"
    yield ["max_position_embeddings"], kind != "learned_absolute", table
    latent = ["q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"]
    names = [*latent, "mup_base_q_lora_rank", "mup_base_kv_lora_rank"]
    yield names, not model.multi_latent_attention, "there is no --multi-latent-attention"
    yield ["rotary_percent"], model.multi_latent_attention, "--qk-pos-emb-head-dim says what is rotated"
    yield ["mup_base_q_lora_rank"], model.q_lora_rank is None, "queries have no latent"
    yield ["add_qkv_bias"], model.add_qkv_bias and model.linear_bias, "all linear layers have biases"
    tied = not model.untie_embeddings_and_output_weights
    yield ["output_layer_init_method_std"], tied, "the output layer is tied to the embedding"
    yield ["decay_output_layer"], tied, "the output layer is tied; --decay-embeddings decides"
    yield from scheme_rules.idle(config)


def _experts(config: Config) -> Iterable[tuple[list[str], bool, str]]:
    moe = config.moe
    none = moe.num_experts is None
    names = [*_names("moe_"), "muon_moe_router", "mup_base_moe_ffn_hidden_size", "mup_router_rule"]
    yield names, none, "there are no experts"
    yield ["moe_router_pre_softmax"], moe.moe_router_score_function == "sigmoid", "the scores are sigmoids"
    yield ["moe_router_bias_update_rate"], not moe.moe_router_enable_expert_bias, "there is no expert bias"
    kind, off = moe.moe_router_load_balancing_type, moe.moe_aux_loss_coeff == 0
    yield ["moe_aux_loss_coeff"], kind == "none" and not off, "the balancing type is none"
    yield ["moe_router_load_balancing_type"], kind != "none" and off, "--moe-aux-loss-coeff is 0"
    unlimited = moe.moe_expert_capacity_factor is None
    yield ["moe_token_drop_policy"], unlimited, "experts have no capacity, so no token is dropped"


def _learning(config: Config) -> Iterable[tuple[list[str], bool, str]]:
    optimizer, schedule = config.optimizer, config.schedule
    name = f"the optimizer is {optimizer.optimizer}"
    kept = ["optimizer_cuda_graph", "optimizer_transport", "print_optimizer_plan"]
    matrix_only = [*_names("muon_", "optimizer_plan_"), *kept]
    yield ["scalar_optimizer", *matrix_only], optimizer.optimizer == "adam", name
    yield ["muon_scale_mode", "muon_extra_scale_factor"], optimizer.optimizer == "scion", name
    yield ["muon_nesterov"], optimizer.optimizer in ("scion", "dion"), name
    local = optimizer.muon_distributed_mode == "local" and config.parallel.tensor_model_parallel_size == 1
    yield ["muon_distributed_mode"], local, "the tensor-parallel size is 1"
    newton_schulz = ["muon_momentum_style", "muon_num_ns_steps", *_names("muon_coefficient_")]
    yield newton_schulz, optimizer.optimizer == "dion", name
    kind = optimizer.coefficient_type
    coefficients = f"the coefficients are {kind}"
    yield ["muon_coefficient_safety"], kind not in ("polar_express", "generated"), coefficients
    yield ["muon_coefficient_lower"], kind != "generated", coefficients
    switch, iterations = optimizer.optimizer_switch_at, config.training.train_iters
    never = switch is not None and iterations is not None and switch >= iterations
    yield ["optimizer"], never, f"the run ends before --optimizer-switch-at {switch}, with AdamW"
    no_switch = switch is None
    yield ["optimizer_switch_carry_state"], no_switch, "there is no --optimizer-switch-at"
    yield _names("dion_"), optimizer.optimizer != "dion", name
    yield _names("normuon_"), optimizer.optimizer != "normuon", name
    yield _names("sphere_"), optimizer.optimizer not in ("muonsphere", "spectral_sphere"), name
    yield ["sphere_solver_steps"], optimizer.optimizer == "muonsphere", name
    yield _names("scion_"), optimizer.optimizer != "scion", name
    tied = not config.model.untie_embeddings_and_output_weights
    yield from _decay(config, tied)
    no_table = tied and config.model.position_embedding_type != "learned_absolute"
    yield _names("scion_embedding_"), no_table, "the embedding is tied to the output layer; --scion-output-radius rules"
    rest = "adam" if optimizer.optimizer == "adam" else optimizer.scalar_optimizer
    spared = f"what is no hidden matrix is trained by {rest}"
    at_work = {rest} if no_switch else {rest, "adam"}
    yield _names("lion_"), rest != "lion", spared
    yield _names("ademamix_"), rest != "ademamix", spared
    yield ["adam_beta1", "adam_beta2"], at_work == {"lion"}, spared
    yield ["adam_eps"], at_work <= {"lion", "adam_atan2"}, spared
    yield ["adam_impl", *_names("exp_avg_")], "adam" not in at_work, spared
    engine = config.parallel.distributed_engine
    yield ["adam_impl", *_names("exp_avg_")], engine != "native", f"{engine} brings its own AdamW"
    yield ["muon_split_fc1"], not config.model.swiglu, "without --swiglu there is no gate to split off"
    style = f"the schedule is {schedule.lr_decay_style}"
    yield _names("lr_wsd_"), schedule.lr_decay_style not in ("WSD", "power"), style
    yield _names("lr_power_"), schedule.lr_decay_style != "power", style
    yield ["min_lr", "lr_decay_iters", "lr_decay_samples"], schedule.lr_decay_style == "constant", style
    no_tail = schedule.lr_wsd_decay_iters is None and schedule.lr_wsd_decay_samples is None
    yield ["lr_wsd_decay_style"], no_tail, "the tail has no length"
    cold = not (schedule.lr_warmup_iters or schedule.lr_warmup_samples or schedule.lr_warmup_fraction)
    yield ["lr_warmup_init"], cold, "there is no warm-up"


def _decay(config: Config, tied: bool) -> Iterable[tuple[list[str], bool, str]]:
    """Where matrices are kept to a norm; routers aren't, nor is what AdamW trains before it changes."""
    flags, all_of_them = config.optimizer, ["weight_decay", "weight_decay_rule"]
    if flags.optimizer_switch_at is not None:
        return
    routers = config.moe.num_experts is not None and not flags.muon_moe_router
    scion, why = flags.optimizer == "scion", "scion's balls take the place of weight decay"
    yield all_of_them, scion and not routers, why
    yield ["decay_embeddings", "decay_output_layer"], scion, why
    hard = flags.optimizer in scheme_rules.SPHERE and flags.sphere_retraction == "hard"
    others = routers or flags.decay_embeddings or (flags.decay_output_layer and not tied)
    yield all_of_them, hard and not others, "hard retraction takes the place of weight decay"


def _layout(config: Config, world_size: int) -> Iterable[tuple[list[str], bool, str]]:
    parallel = config.parallel
    alone = parallel.tensor_model_parallel_size == 1
    yield ["sequence_parallel"], parallel.sequence_parallel and alone, "the tensor-parallel size is 1"
    yield ["cp_comm_type"], parallel.context_parallel_size == 1, "the context-parallel size is 1"
    idle = config.moe.moe_shared_expert_intermediate_size is None or parallel.expert_model_parallel_size == 1
    yield ["moe_shared_expert_overlap"], idle, "there are no shared experts, or no tokens travel to other ranks"
    cut = [*_names("account_for_", "pipeline_schedule", "pipeline_model_parallel_layout", "num_virtual_stages_")]
    cut += [*_names("decoder_first_", "decoder_last_"), "num_layers_per_virtual_pipeline_stage"]
    yield cut, parallel.pipeline_model_parallel_size == 1, "the pipeline has one stage"
    whole = "nothing is sharded over data-parallel ranks"
    yield ["num_distributed_optimizer_instances", "fsdp_transport"], parallel.sharding == "no_shard", whole
    one = config.sharding_size(world_size) == 1
    uncut = alone and (one or parallel.sharding == "no_shard")
    gram = config.optimizer.muon_distributed_mode == "gram"
    yield ["muon_distributed_mode"], gram and uncut, "no ranks hold parts of a matrix"
    yield ["dion_compressed_sync"], one, "there is one data-parallel rank, and no replica"
    lone = "there is one data-parallel rank"
    yield ["grad_reduce_in_bf16"], one and parallel.grad_reduce_in_bf16, lone
    strategy = ["data_parallel_sharding_strategy", "use_torch_fsdp2", "use_distributed_optimizer"]
    yield strategy, one and parallel.sharding != "no_shard", lone
    yield ["use_distributed_optimizer"], parallel.use_distributed_optimizer and parallel.use_torch_fsdp2, "FSDP2 has it"
    native = parallel.distributed_engine == "native"
    yield ["zero_stage", "optimizer_cpu_offload"], native, "the engine is native, not deepspeed"


def _run(config: Config) -> Iterable[tuple[list[str], bool, str]]:
    training, data, checkpoint, logging = config.training, config.data, config.checkpoint, config.logging
    yield ["main_params_dtype"], not training.bf16, "without --bf16 everything is fp32"
    chunks = ["recompute_method", "recompute_num_layers"]
    yield chunks, training.recompute != "full", f"recomputation is {training.recompute}, not full"
    whole = "--cross-entropy-fusion-impl is native"
    yield ["loss_chunk_size"], training.cross_entropy_fusion_impl == "native", whole
    fp8 = config.fp8
    scaling = ["fp8_margin", *_names("fp8_amax_")]
    no_fp8 = ["fp8_recipe", "fp8_critical_bf16", "fp8_wgrad", "first_last_layers_bf16", *scaling]
    yield no_fp8, fp8.fp8_format is None, "there is no --fp8-format"
    settled = fp8.fp8_format is None and training.transformer_impl == "local"
    yield ["fp8_fallback"], settled, "neither --fp8-format nor --transformer-impl asks for more than every GPU has"
    yield ["fp8_wgrad"], fp8.fp8_recipe == "static", "the recipe is static, which multiplies for all gradients in FP8"
    yield scaling, fp8.fp8_recipe != "delayed", f"the recipe is {fp8.fp8_recipe}, not delayed"
    ends = ["num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"]
    yield ends, not config.fp8.first_last_layers_bf16, "there is no --first-last-layers-bf16"
    yield ["activation_memory_budget"], not training.torch_compile, "only --torch-compile has a compiler to ask"
    yield ["manual_gc_interval"], not training.manual_gc, "there is no --manual-gc"
    yield _names("profile_"), not config.logging.profile, "there is no --profile"
    unevaluated = "without --eval-interval there is no evaluation"
    yield ["eval_iters"], training.eval_interval is None and training.eval_iters > 0, unevaluated
    idle_valid = training.evaluation_interval is None and bool(data.valid_data_path)
    yield ["valid_data_path"], idle_valid, unevaluated if training.eval_iters else "--eval-iters 0 evaluates nothing"
    yield ["split"], not data.data_path, "only --data-path is split"
    yield ["data_cache_path"], data.mock_data, "synthetic data has no cache"
    no_save, no_load = checkpoint.save is None, checkpoint.load is None
    yield ["keep_last", "save_retain_interval", "async_save", "no_save_optim"], no_save, "there is no --save folder"
    non_persistent = ["non_persistent_ckpt_type", "non_persistent_local_ckpt_dir"]
    never = checkpoint.non_persistent_save_interval is None
    yield non_persistent, never, "without --non-persistent-save-interval nothing is saved or loaded there"
    is_global = checkpoint.non_persistent_ckpt_type == "global"
    yield non_persistent[1:], is_global, "--non-persistent-ckpt-type global saves beside --save"
    loads = ["exit_on_missing_checkpoint", "override_opt_param_scheduler", *_names("no_load_")]
    yield loads, no_load, "there is no --load folder"
    fresh = "--finetune loads weights only"
    yield ["override_opt_param_scheduler", *_names("no_load_")], checkpoint.finetune, fresh
    guards = ["spike_sigma", "spike_window", "max_rollbacks"]
    yield guards, config.guard.max_skipped_steps == 0, "without --max-skipped-steps no step is left out"
    yield ["spike_window"], config.guard.spike_sigma is None, "without --spike-sigma no step is a spike"
    wandb = ["wandb_exp_name", "wandb_entity", "wandb_save_dir"]
    yield wandb, logging.wandb_project is None, "there is no --wandb-project"
