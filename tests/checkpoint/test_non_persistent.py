"""Non-persistent saves: the newest that is whole is gone on with; a lost or damaged one costs no more than it saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_mup import checkpoint
from megatron_mup.checkpoint import files, local
from megatron_mup.config import ConfigError
from tests.checkpoint.cases import Run, config_of, fill, wrong
from tests.checkpoint.test_verify import flip
from tests.runs import config_of as config_of_flags
from tests.runs import pretrain, recorded, saved_tensors, words

FLAGS = (
    "--train-iters 6 --optimizer muon --save-interval 4 --non-persistent-save-interval 1 --log-interval 1 "
    "--data-parallel-sharding-strategy optim_grads_params"
)


def run(pool, folder: Path, *more: str, ranks: int = 2) -> str:
    """A whole run in a folder, and what it said."""
    files = f"--save {folder}/run --load {folder}/run --metrics-file {folder}/metrics.jsonl"
    outcomes = pool.launch(ranks, pretrain, words(FLAGS, files, *more))
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes
    return "".join(outcome.out + outcome.err for outcome in outcomes)


def local_flags(folder: Path) -> str:
    return f"--non-persistent-ckpt-type local --non-persistent-local-ckpt-dir {folder}/disk"


def kill_after_five(folder: Path) -> None:
    """Leaves what a run that is killed in its sixth iteration leaves: the last save for good is that of the fourth."""
    shutil.rmtree(folder / "run" / "iter_0000006")
    (folder / "run" / "latest_checkpointed_iteration.txt").write_text("4\n")


@pytest.fixture(scope="module")
def killed(pool, tmp_path_factory):
    """Runs that saved iteration 5 for the time being, by kind; and the unbroken run's losses and end."""
    made = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            run(pool, made[kind], local_flags(made[kind]) if kind == "local" else "")
            shutil.copytree(made[kind] / "run", made[kind] / "unbroken")
            kill_after_five(made[kind])
        return made[kind]

    return get


@pytest.fixture
def broken(killed, tmp_path):
    def get(kind: str) -> Path:
        shutil.copytree(killed(kind), tmp_path, dirs_exist_ok=True)
        # Whose a local checkpoint is, its folder and its manifest say.
        for theirs in tmp_path.glob("disk/*"):
            theirs.rename(local.run_folder(tmp_path / "disk", str(tmp_path / "run")))
        for file in tmp_path.glob("disk/*/*/*/manifest.json"):
            file.write_text(file.read_text().replace(str(killed(kind) / "run"), str(tmp_path / "run")))
        return tmp_path

    return get


def locals_of(folder: Path) -> list[str]:
    mine = local.run_folder(folder / "disk", str(folder / "run"))
    return sorted(str(path.relative_to(mine)) for path in mine.glob("*/iter_*"))


def assert_goes_on(pool, folder: Path, iteration: int, *more: str) -> str:
    """Resumes at an iteration and ends as the unbroken run did, bit for bit."""
    before = recorded(folder / "metrics.jsonl", "train/lm loss")
    said = run(pool, folder, *more)
    assert f": iteration {iteration}, " in said
    assert recorded(folder / "metrics.jsonl", "train/lm loss") == before
    there, want = (saved_tensors(folder / name / "iter_0000006") for name in ("run", "unbroken"))
    assert all(torch.equal(there[key], value) for key, value in want.items())
    return said


def test_the_newest_is_gone_on_with(pool, broken):
    folder = broken("local")
    assert locals_of(folder) == ["rank_00000/iter_0000005", "rank_00001/iter_0000005"]
    assert_goes_on(pool, folder, 5, local_flags(folder))


@pytest.mark.parametrize(
    "loss", ["folder", *(pytest.param(x, marks=pytest.mark.long) for x in ("shard", "bit", "run"))]
)
def test_a_rank_that_lost_its_part(pool, broken, loss):
    """All ranks go back to the checkpoint that was saved for good, and the other parts go."""
    folder = broken("local")
    mine = local.run_folder(folder / "disk", str(folder / "run")) / "rank_00001" / "iter_0000005"
    if loss == "folder":
        shutil.rmtree(mine.parent)
    elif loss == "shard":
        (mine / "__0_0.distcp").unlink()
    elif loss == "bit":
        flip(mine / "__0_0.distcp", 3000)
    else:
        (mine / "manifest.json").write_text((mine / "manifest.json").read_text().replace("/run", "/other"))
    said = assert_goes_on(pool, folder, 4, local_flags(folder))
    assert "the local checkpoint of iteration 5 is not whole: rank 1 on " in said
    assert locals_of(folder) == ["rank_00000/iter_0000005", "rank_00001/iter_0000005"]


@pytest.mark.long
def test_other_runs_on_the_disk_keep_theirs(pool, broken):
    """Those that stand where all runs once saved, too."""
    folder = broken("local")
    theirs = folder / "disk" / "rank_00000" / "iter_0000005"
    shutil.copytree(next(folder.glob("disk/*/rank_00000/iter_0000005")), theirs)
    manifest = theirs / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(folder / "run"), str(folder / "other")))
    shutil.rmtree(next(folder.glob("disk/*/rank_00001/iter_0000005")))
    assert_goes_on(pool, folder, 4, local_flags(folder))
    assert theirs.is_dir()


def save_of_two_runs(folder: str) -> list[tuple[str, list[str]]]:
    """Two runs save the same iteration to one disk; a third has saved where all runs once did. What each finds."""
    run, found = Run(config_of("fsdp2")), []
    layout, names = checkpoint.layout_sizes(run.mesh), ["/a/run", "/b/run", "/c/run"]
    for seed, name in enumerate(names):
        fill(run.pieces(), seed)
        local.save(folder, run.pieces(), run.manifest(5), name)
    shared = Path(folder) / local.rank_folder(folder, names[2]).name
    local.rank_folder(folder, names[2]).rename(shared)
    for seed, name in enumerate(names):
        path = local.find(folder, name, layout)
        pieces = run.pieces()
        fill(pieces, 9)
        local.load(path, pieces, run.config)
        found.append((path.name, wrong(pieces, seed)))
    fill(run.pieces(), 4)
    local.save(folder, run.pieces(), run.manifest(6), names[2])
    # The one before goes, wherever it stands.
    return [*found, *((path.name, []) for path in shared.glob("iter_*"))]


def test_runs_on_one_disk(pool, tmp_path):
    assert pool.run(2, save_of_two_runs, str(tmp_path)) == [[("iter_0000005", [])] * 3] * 2


def test_another_layout_takes_what_any_layout_can_read(pool, broken):
    folder = broken("local")
    assert "iteration 4, " in run(pool, folder, local_flags(folder), ranks=1)
    # Rank 1 is no rank of this run; its part is not this run's to remove.
    assert locals_of(folder) == ["rank_00000/iter_0000005", "rank_00001/iter_0000005"]


def test_beside_the_others_for_any_layout(pool, broken):
    folder = broken("global")
    assert [path.name for path in (folder / "run" / "non_persistent").glob("iter_*")] == ["iter_0000005"]
    flip(folder / "run" / "non_persistent" / "iter_0000005" / "__0_0.distcp", 3000)
    shutil.copytree(folder, folder / "damaged")
    flip(folder / "run" / "non_persistent" / "iter_0000005" / "__0_0.distcp", 3000)
    assert_goes_on(pool, folder, 5)
    assert ": iteration 4, " in run(pool, folder / "damaged")


def save_and_look(folder: str) -> tuple[str, list[str], str, list[str]]:
    """Saves three times, the last time in vain; what is found then, what is wrong in it, the error, and what stands."""
    run = Run(config_of("tp2-fsdp2"))
    layout = checkpoint.layout_sizes(run.mesh)
    for iteration in (1, 2):
        fill(run.pieces(), iteration)
        local.save(folder, run.pieces(), run.manifest(iteration), "mine")
    error = ""
    rank = run.mesh.world.get_rank()
    if rank == 3:
        (local.rank_folder(folder, "mine") / ".iter_0000003.tmp-a").mkdir()
        whole, files.hidden = files.hidden, lambda *_: Path("/dev/null/rank_00003")
    try:
        local.save(folder, run.pieces(), run.manifest(3), "mine")
    except ConfigError as caught:
        error = str(caught)
    if rank == 3:
        files.hidden = whole
    assert local.find(folder, "another", layout) is None
    assert local.find(folder, "mine", {**layout, "tp": 1}) is None
    assert local.find(folder, "mine", layout, after=2) is None
    path = local.find(folder, "mine", layout, after=1)
    pieces = run.pieces()
    fill(pieces, 9)
    local.load(path, pieces, run.config)
    stand = sorted(p.name for p in local.rank_folder(folder, "mine").glob("iter_*"))
    return path.name, wrong(pieces, 2), error, stand


def test_what_ranks_save_for_themselves(pool, tmp_path):
    results = pool.run(4, save_and_look, str(tmp_path))
    assert [(name, bad) for name, bad, _, _ in results] == [("iter_0000002", [])] * 4
    assert {error for _, _, error, _ in results} == {results[0][2]}
    assert "rank_00003" in results[0][2]
    assert "can't be written" in results[0][2]
    # The others saved iteration 3; that it isn't whole costs nothing.
    assert [stand for _, _, _, stand in results] == [["iter_0000002", "iter_0000003"]] * 3 + [["iter_0000002"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--non-persistent-save-interval 2", "there is no --save folder"),
        ("--save x --non-persistent-ckpt-type local", "give --non-persistent-local-ckpt-dir FOLDER"),
        ("--save x --non-persistent-save-interval 0", "--non-persistent-save-interval 0"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(ConfigError) as caught:
        config_of_flags(flags)
    assert message in str(caught.value)
