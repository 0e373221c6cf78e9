"""Real training on a Slurm that takes its nodes away: for a more urgent job, and because a node dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import arguments, events, losses, run_together
from tests.support.slurm.jobs import ONE_NODE, TWO_NODES, submit, trained, words
from tests.support.slurm.mini_slurm import NODES, MiniSlurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 60


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("faults")
    quiet = {"data.val": None, "log.activations_interval_steps": 1000}
    return {"out": str(out), "steps": STEPS, "checkpoint.interval_steps": 3, **quiet}


@pytest.fixture(scope="module")
def whole(run_file: Path, settings: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """Return the losses of the same runs without interruption and without Slurm: on two ranks, and with two seeds on one."""
    out = tmp_path_factory.mktemp("whole")
    commands = {
        "two": (arguments(run_file, settings | {"out": str(out), "name": "two"}), 2),
        **{
            f"seed{s}": (arguments(run_file, settings | {"out": str(out), "name": f"seed{s}", "seed": s}), 1)
            for s in (1, 2)
        },
    }
    ended = run_together(commands, out / "logs")
    assert [each.code for each in ended.values()] == [0, 0, 0]
    return {name: losses(out / name) for name in commands}


def test_a_node_that_dies_in_mid_step_leads_to_requeue_and_resume(
    slurm: MiniSlurm, submit_folder: Path, run_file: Path, settings: dict, whole: dict
) -> None:
    folder = Path(settings["out"]) / "node"
    job = submit(slurm, submit_folder, words(run_file, settings | {"name": "node"}), *TWO_NODES, log="node")
    slurm.wait_for(trained(folder, 7), "step 7")
    slurm.kill_node(NODES[1])
    slurm.wait_for(lambda: slurm.node_states()[NODES[1]].startswith("down"), "Slurm to notice that a node is dead")
    assert not slurm.over(job)
    slurm.start_node(NODES[1])
    ended, log = slurm.wait_over(job), (submit_folder / "node.txt").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert int(ended["Restarts"]) >= 1
    resumed = [event["step"] for event in events(folder, "resumed")]
    assert resumed
    assert all(step >= 6 and step % 3 == 0 for step in resumed)
    assert losses(folder) == whole["two"]


def test_jobs_that_give_way_to_a_more_urgent_one_continue_after_it(
    slurm: MiniSlurm, submit_folder: Path, run_file: Path, settings: dict, whole: dict
) -> None:
    out = Path(settings["out"])
    common = [word for key, value in settings.items() for word in ("--set", f"{key}={value if value else 'null'}")]
    listing = submit_folder / "seeds.txt"
    listing.write_text("".join(f"'{run_file}' --set name=seed{seed} --set seed={seed}\n" for seed in (1, 2)))
    victim = submit(slurm, submit_folder, words(run_file, settings | {"name": "victim"}), *TWO_NODES, log="victim")
    array = submit(slurm, submit_folder, [listing, *common], *ONE_NODE, "--array=1-2", script="sweep", log="sweep-%a")
    slurm.wait_for(trained(out / "victim", 3), "the third step")
    nodes = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.txt")
    urgent = slurm.submit(*nodes, "--wrap=echo urgent work", cwd=submit_folder)
    assert slurm.wait_over(urgent)["JobState"] == "COMPLETED"
    names = {"victim": (victim, "victim", "two"), "seed1": (f"{array}_1", "sweep-1", "seed1")}
    names["seed2"] = (f"{array}_2", "sweep-2", "seed2")
    for name, (job, log, reference) in names.items():
        ended, said = slurm.wait_over(job), (submit_folder / f"{log}.txt").read_text()
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), said
        assert int(ended["Restarts"]) >= 1 or name != "victim", said
        assert losses(out / name) == whole[reference], said
