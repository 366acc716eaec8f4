import subprocess
import sys
from pathlib import Path

import pytest
from config_cases import build

from megatron_mup.config import Config, ConfigError, parse_config
from megatron_mup.config.aliases import ALIASES
from megatron_mup.config.docs import reference
from megatron_mup.config.fields import settings
from megatron_mup.config.given import find, is_switch

HERE = Path(__file__).parent


def error(*argv: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(argv)
    return caught.value


def recipe(folder: Path, text: str, name: str = "r.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_no_flags_give_the_defaults():
    parsed = parse_config([])
    assert parsed.config == Config()
    assert parsed.explicit == frozenset()
    assert not parsed.print_config
    assert parsed.warnings == ()


def test_flags_of_every_kind():
    argv = (
        "--num-layers 4 --lr=3e-3 --swiglu --no-progress --normalization LayerNorm --save None --seed -0 --print-config"
    )
    parsed = parse_config(
        [*argv.split(), "--data-path", "0.3", "a", "0.7", "b", "--rampup-batch-size", "4", "4", "100"]
    )
    config = parsed.config
    assert (config.model.num_layers, config.optimizer.lr, config.model.swiglu) == (4, 3e-3, True)
    assert (config.logging.progress, config.model.normalization, config.checkpoint.save) == (False, "LayerNorm", None)
    assert config.data.data_path == ("0.3", "a", "0.7", "b")
    assert config.training.rampup_batch_size == (4, 4, 100)
    assert parsed.print_config
    assert parsed.explicit == {
        "num_layers", "lr", "swiglu", "progress", "normalization", "save", "seed", "data_path", "rampup_batch_size",
    }  # fmt: skip


def test_underscores_are_dashes_and_the_last_word_counts():
    assert parse_config(["--num_layers", "4", "--num-layers=6", "--swiglu", "--no_swiglu"]).config == build(
        "--num-layers", "6", good=False
    )


def test_default_is_what_flags_start_from():
    start = build("--lr", "1e-3")
    assert parse_config(["--seed", "1"], start).config == build("--lr", "1e-3", "--seed", "1")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--num-layer 3", ["--num-layer", "no such flag", "--num-layers"]),
        ("--tensor-parallel-size 2", ["--tensor-model-parallel-size"]),
        ("--mup-base-widht 2", ["--mup-base-width"]),
        ("--no-swiglo", ["--no-swiglu"]),
        ("--confg x", ["--config"]),
        ("-lr 3", ["-lr", "no such flag", "--lr"]),
        ("--", ["no such flag", "--help"]),
        ("--zzzz", ["no such flag", "--help"]),
        ("recipe.yaml", ["recipe.yaml", "--config"]),
        ("--num-layers x", ["--num-layers x", "whole number", "--num-layers 12"]),
        ("--num-layers 1.5", ["--num-layers 1.5", "whole number"]),
        ("--num-layers", ["--num-layers", "needs a value"]),
        ("--lr --swiglu", ["--lr", "needs a value"]),
        ("--lr 1 2", ["--lr 1 2", "got 2 values"]),
        ("--swiglu 1", ["--swiglu 1", "takes no value", "--no-swiglu"]),
        ("--no-swiglu=1", ["takes no value"]),
        ("--normalization rmsnorm", ["--normalization rmsnorm", "RMSNorm, LayerNorm", "--normalization RMSNorm"]),
        ("--rampup-batch-size 1 2", ["3 whole numbers"]),
        ("--rampup-batch-size 1 2 x", ["--rampup-batch-size 1 2 x", "3 whole numbers"]),
        ("--data-path", ["--data-path", "needs a value"]),
        ("--use-mup 1", ["takes no value"]),
        ("--mup-base-width x", ["--mup-base-width x", "whole number"]),
        ("--use-mup --parametrization completep", ["--use-mup", "--parametrization completep", "give one"]),
        ("--mup-base-width 2 --mup-base-hidden-size 3", ["--mup-base-width 2", "--mup-base-hidden-size 3"]),
        ("--group-query-attention", ["--group-query-attention", "--num-query-groups"]),
        ("--no-position-embedding --position-embedding-type learned_absolute", ["contradict"]),
        ("--accumulate-allreduce-grads-in-fp32 --grad-reduce-in-bf16", ["contradict"]),
        ("--no-decay-norm-bias-embed --decay-embeddings", ["contradict"]),
        ("--ckpt-format zarr", ["--ckpt-format zarr", "only torch_dist"]),
        ("--ckpt-format", ["takes one value"]),
        ("--muon-matched-adamw-rms x", ["takes a number"]),
        ("--muon-tp-mode x", ["takes duplicated, blockwise or distributed"]),
        ("--config", ["path of one recipe"]),
        ("--config /no/such.yaml", ["/no/such.yaml", "No such file"]),
        ("--config /", ["Is a directory"]),
        ("--print-config 1", ["takes no value"]),
    ],
)
def test_a_mistake_is_told_with_its_remedy(argv, parts, capfd):
    message = str(error(*argv.split()))
    assert [part for part in parts if part not in message] == []
    assert capfd.readouterr() == ("", ""), "tyro printed"


@pytest.mark.parametrize(
    ("alias", "plain"),
    [
        ("--use-mup", "--parametrization mup"),
        ("--mup-base-width 64", "--mup-base-hidden-size 64"),
        ("--mup-input-scale 12", "--mup-embedding-mult 12"),
        ("--mup-output-scale 2", "--mup-output-mult 2"),
        ("--muon-ns-steps 8", "--muon-num-ns-steps 8"),
        ("--muon-matched-adamw-rms 0.2", "--muon-scale-mode match_rms_adamw"),
        ("--muon-tp-mode blockwise", "--muon-distributed-mode local"),
        ("--muon-tp-mode duplicated", "--muon-distributed-mode owner"),
        ("--muon-matched-adamw-rms 0.4", "--muon-scale-mode match_rms_adamw --muon-extra-scale-factor 2"),
        ("--muon-no-split-qkv", "--no-muon-split-qkv"),
        ("--use-flash-attn", "--attention-backend flash"),
        ("--enable-cuda-graph", "--cuda-graph-impl local"),
        ("--use-rotary-position-embeddings --no-position-embedding", "--position-embedding-type rope"),
        ("--group-query-attention --num-query-groups 4", "--num-query-groups 4"),
        ("--use-mup --parametrization mup", "--parametrization mup"),
        ("--no-decay-norm-bias --no-decay-norm-bias-embed", ""),
        ("--ckpt-format torch_dist --use-mcore-models --overlap-grad-reduce", ""),
    ],
)
def test_aliases_say_the_same(alias, plain):
    assert parse_config(alias.split()).config == parse_config(plain.split()).config


def test_xmodel_flags_that_are_settings_here():
    argv = "--mup-attention-residual-scale 1.4 --mup-ffn-residual-scale 1.4 --softmax-scale 0.1 --muon-momentum 0.9 "
    config = build(*argv.split(), "--no-muon-nesterov")
    assert config.parametrization.mup_attention_residual_scale == 1.4
    assert (config.model.softmax_scale, config.optimizer.muon_nesterov) == (0.1, False)


def test_aliases_name_settings_and_shadow_none():
    for alias in ALIASES.values():
        assert find(alias.flag)[0] is None, f"--{alias.flag} is a setting"
        named = [alias.renames, alias.needs, *alias.sets, *(alias.excludes or ())[:1]]
        assert {name for name in named if name} <= settings().keys()
        assert alias.meaning
        assert sum(map(bool, (alias.renames, alias.sets, alias.convert))) <= 1


def test_aliases_that_change_nothing_warn():
    argv = ["--ckpt-format", "torch_dist", "--use-mcore-models", "--group-query-attention", "--num-query-groups", "4"]
    told = parse_config(argv).warnings
    assert [warning.split(" changes nothing")[0] for warning in told] == [
        "--ckpt-format torch_dist",
        "--use-mcore-models",
    ]


@pytest.mark.parametrize("flag", [alias.flag for alias in ALIASES.values() if alias.refused])
def test_what_megatron_has_and_this_has_not_is_told(flag):
    message = str(error(f"--{flag}"))
    assert f"--{flag}: {ALIASES[flag].refused}" in message
    assert "drop it" in message


def test_the_flags_are_frozen():
    """A new flag is a promise: add it to flags.txt by hand."""
    now = sorted(s.flag for s in settings().values()) + sorted(f"--{flag} (alias)" for flag in ALIASES)
    assert now == (HERE / "flags.txt").read_text().splitlines()


def test_help_is_grouped(capsys):
    with pytest.raises(SystemExit) as left:
        parse_config(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    for part in ("model options", "parallel options", "--num-layers", "--config", "--print-config", "--mup-base-width"):
        assert part in shown


def test_the_committed_reference_is_up_to_date():
    page = HERE.parents[1] / "docs" / "configuration.md"
    assert page.read_text() == reference(), "run: python -m megatron_mup.config.docs > docs/configuration.md"


def test_every_setting_has_help():
    assert [s.name for s in settings().values() if not s.help.endswith(".") and not s.help.endswith(")^2.")] == []


def test_importing_the_configuration_loads_no_torch():
    code = "import sys, megatron_mup.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Recipes


def test_a_recipe_equals_the_command_line(tmp_path):
    path = recipe(
        tmp_path,
        """
        model:
          num-layers: 4
          swiglu: yes
          init_method_std: 2e-2
          group_query_attention: true
          num_query_groups: 4
        optimizer: muon
        parametrization: {use_mup: true, mup-base-width: 64, depth_alpha: 1}
        training:
          rampup_batch_size: [4, 4, 100]
          seed: 010
        no_muon_nesterov: true
        use_flash_attn: false
        data_path: [0.3, a, 7e-1, b]
        split: 969,30,1
        wandb_exp_name: 2024-01-01
        save: ~
        """,
    )
    line = "--num-layers 4 --swiglu --init-method-std 0.02 --num-query-groups 4 --optimizer muon --parametrization mup"
    line += (
        " --mup-base-hidden-size 64 --rampup-batch-size 4 4 100 --seed 10 --no-muon-nesterov --data-path 0.3 a 7e-1 b"
    )
    line += " --wandb-exp-name 2024-01-01"
    assert parse_config(["--config", path]).config == parse_config(line.split()).config


def test_the_command_line_wins_over_the_recipe_in_any_order(tmp_path):
    path = recipe(tmp_path, "lr: 1e-3\nnum_layers: 4\nmup_base_width: 8\n")
    for argv in (["--config", path, "--lr", "2e-3"], ["--lr", "2e-3", f"--config={path}"]):
        config = parse_config(argv).config
        assert (config.optimizer.lr, config.model.num_layers) == (2e-3, 4)
    assert parse_config(["--config", path, "--mup-base-hidden-size", "9"]).config == build(
        *["--lr", "1e-3", "--num-layers", "4", "--mup-base-width", "9"], good=False
    )


def test_recipes_stand_on_bases_and_on_one_another(tmp_path):
    (tmp_path / "sub").mkdir()
    recipe(tmp_path, "lr: 1\nseed: 1\nnum_layers: 1\n", "base.yaml")
    top = recipe(tmp_path / "sub", "base: ../base.yaml\nseed: 2\nnum_layers: 2\n")
    other = recipe(tmp_path, "num_layers: 3\n", "other.yaml")
    config = parse_config(["--config", top, "--config", other]).config
    assert (config.optimizer.lr, config.training.seed, config.model.num_layers) == (1, 2, 3)


def test_merge_keys(tmp_path):
    path = recipe(tmp_path, "model: &m {num_layers: 2, hidden_size: 64}\n")
    assert parse_config(["--config", path]).config.model.hidden_size == 64
    path = recipe(tmp_path, "model:\n  <<: {num_layers: 2, hidden_size: 64}\n  num_layers: 3\n")
    model = parse_config(["--config", path]).config.model
    assert (model.num_layers, model.hidden_size) == (3, 64)


def test_explicit_counts_recipe_keys_that_differ_from_the_default(tmp_path):
    path = recipe(tmp_path, "rotary_base: 10000.0\nnum_layers: 2\n")
    assert parse_config(["--config", path, "--seed", "1234"]).explicit == {"num_layers", "seed"}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "model:\n# num_layers: 3\n"])
def test_empty_recipes(tmp_path, text):
    assert parse_config(["--config", recipe(tmp_path, text)]).config == Config()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lr: 1\nnum_layer: 3\n", ["r.yaml:2", "num_layer", "num_layers"]),
        ("model:\n  hidden_sise: 3\n", ["r.yaml:2", "hidden_size"]),
        ("modell:\n  hidden_size: 3\n", ["r.yaml:1: modell", "model"]),
        ("zzzz: 1\n", ["r.yaml:1: zzzz", "no such setting"]),
        ("model: 3\n", ["r.yaml:1: model", "section"]),
        ("model:\n  lr: 1\n", ["r.yaml:2: lr", "section optimizer"]),
        ("model:\n  mup_base_width: 1\n", ["section parametrization"]),
        ("lr: 1\nlr: 2\n", ["r.yaml:2: lr", "twice"]),
        ("num-layers: 1\nnum_layers: 2\n", ["twice"]),
        ("lr: [1\n", ["r.yaml:2", "not valid YAML"]),
        ("lr: 1\n\tseed: 2\n", ["r.yaml:2", "not valid YAML"]),
        ("a: *b\n", ["r.yaml:1", "not valid YAML"]),
        ("a\x00b", ["r.yaml", "not valid YAML"]),
        ("--- 1\n--- 2\n", ["not valid YAML"]),
        ("- 1\n", ["r.yaml:1", "mapping"]),
        ("? [1]\n: 2\n", ["r.yaml:1", "name of a setting"]),
        ("model: {<<: 3}\n", ["not valid YAML"]),
        ("num_layers: x\n", ["r.yaml:1: num_layers: x", "whole number"]),
        ("num_layers: true\n", ["whole number"]),
        ("num_layers: ~\n", ["is empty"]),
        ("num_layers: {a: 1}\n", ["plain value"]),
        ("num_layers: [1, 2]\n", ["got 2 values"]),
        ("num_layers: !!python/object:os.system 1\n", ["plain value"]),
        ("swiglu: 1\n", ["true or false"]),
        ("swiglu: ~\n", ["true or false"]),
        ("use_mup: maybe\n", ["true or false"]),
        ("save: yes\n", ["quote it"]),
        ("data_path: [a, ~]\n", ["is empty"]),
        ("data_path: ~\n", ["is empty"]),
        ("split: ~\n", ["is empty"]),
        ("optimizer: lion\n", ["adam, muon"]),
        ("use_mup: true\nparametrization: completep\n", ["r.yaml:1", "r.yaml:2", "different values"]),
        ("base: r.yaml\n", ["circle"]),
        ("base: [a]\n", ["path of one recipe"]),
        ("base: nowhere.yaml\n", ["nowhere.yaml", "No such file"]),
        ("config: x\n", ["config", "no such setting"]),
        ("[" * 5000, ["r.yaml"]),
    ],
)
def test_a_mistake_in_a_recipe_is_told_with_its_line(tmp_path, text, parts):
    message = str(error("--config", recipe(tmp_path, text)))
    assert [part for part in parts if part not in message] == []


def test_a_recipe_that_is_no_text(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"lr: \xff\xfe")
    assert "UTF-8" in str(error("--config", str(path)))


def test_switches_are_switches():
    assert is_switch("swiglu")
    assert is_switch("no-swiglu")
    assert is_switch("use-mup")
    assert not is_switch("mup-base-width")
    assert not is_switch("nonsense")
