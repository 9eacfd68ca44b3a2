"""An ensemble that one recipe trains: as many reward stages, made, checked and scored with."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.inputs import reward_sources
from align.places import member_runs
from align.recipe_io import load_recipe
from align.stages import recipe_sha256
from launch.opened import Settings, open_recipe
from launch.plan import plan_experiment
from tests.stand_ins import RECIPE, align, build

ENSEMBLE = (
    RECIPE.replace("data:\n", "data:\n  reward: {train: [{world: rankings}]}\n").replace(
        "reward: m:f", "reward: [{ensemble: reward, std_penalty: 1.0}]"
    )
    + "reward: {members: 3, lr: 1e-3, batch_size: 2}\n"
)
MEMBERS = ("member-2", "member-3")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    build(tmp_path)
    (tmp_path / "r.yaml").write_text(ENSEMBLE)
    return tmp_path


def manifest(place: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "runs/x" / stage / "stage.json").read_text())
    return found


def test_members_are_made_after_the_first_and_differ_by_their_seed(place: Path) -> None:
    output, _ = align(place, "run", "r.yaml", "seed=5")
    told = [line.partition(" (")[0] for line in output.splitlines() if "running" in line]
    assert told == [
        "sft: running",
        "reward: running",
        "member-2: reward: running",
        "member-3: reward: running",
        "ppo: running",
        "evaluate: running",
    ]
    folders = ["reward", *(f"members/{name}/reward" for name in MEMBERS)]
    assert len({manifest(place, folder)["seed"] for folder in folders}) == 3
    recipes = [yaml.safe_load((place / "runs/x" / f / "recipe.yaml").read_text()) for f in folders]
    for recipe in recipes[1:]:
        assert recipe["run"]["parents"]["sft"] == "runs/x/sft"
        assert recipe["tracking"].pop("group") == "x"
        for key in ("data", "base", "tokenizer", "adapter", "sft"):
            assert recipe[key] == recipes[0][key]
        assert recipe["reward"] == recipes[0]["reward"] | {"members": 1}

    output, _ = align(place, "run", "r.yaml", "seed=5", "--json")
    result = json.loads(output)["stages"]
    assert {stage["status"] for stage in result.values()} == {"skipped"}
    assert [member["status"] for member in result["reward"]["members"]] == ["skipped"] * 2


def test_a_member_that_fails_is_made_by_the_same_command_again(place: Path) -> None:
    _, errors = align(place, "run", "r.yaml", code=2, FAIL="member-3")
    assert "reward: no more rows" in errors
    assert not (place / "runs/x/ppo").exists()
    output, _ = align(place, "run", "r.yaml", "--dry-run", "--json")
    found = json.loads(output)["stages"]
    assert [m["why"] for m in found["reward"]["members"].values()] == [
        None,
        "no finished result yet",
    ]
    assert found["ppo"]["why"] == "its parent reward runs before it"
    output, _ = align(place, "run", "r.yaml")
    assert "member-2: reward: up to date" in output
    assert "member-3: reward: running (no finished result yet)" in output
    assert "ppo: done" in output


def test_one_stage_alone_makes_all_members_and_ppo_alone_needs_them(place: Path) -> None:
    align(place, "sft", "r.yaml")
    align(place, "reward", "r.yaml", "reward.members=2")
    assert (place / "runs/x/members/member-2/reward/stage.json").is_file()
    _, errors = align(place, "ppo", "r.yaml", code=2)
    assert "ppo.reward.0: runs/x/members/member-3/reward: no finished reward stage" in errors
    assert errors.endswith("; `align reward` makes all members\n")
    output, _ = align(place, "reward", "r.yaml")
    assert [line for line in output.splitlines() if "running" in line] == [
        "member-3: reward: running (no finished result yet)"
    ]
    align(place, "ppo", "r.yaml")


def test_another_seed_redoes_all_members_and_what_scores_with_them(place: Path) -> None:
    align(place, "run", "r.yaml")
    output, _ = align(place, "run", "r.yaml", "reward.lr=2e-3", "--dry-run", "--json")
    found = json.loads(output)["stages"]
    changed = "its settings in the recipe have changed"
    assert found["sft"]["why"] is None
    assert found["reward"]["why"] == changed
    assert {m["why"] for m in found["reward"]["members"].values()} == {changed}
    # One member changed on its own, too.
    weights = place / "runs/x/members/member-2/reward/model/w"
    weights.unlink()
    output, _ = align(place, "run", "r.yaml", OTHER="1")
    assert "member-2: reward: running (its output model/w is missing)" in output
    assert "ppo: running (its parent reward has changed)" in output


def test_members_are_made_beside_a_benchmark_which_is_the_evaluations(place: Path) -> None:
    source = "data.benchmark={mine: {world: pairs, split: heldout}}"
    align(place, "sft", "r.yaml")
    output, _ = align(place, "reward", "r.yaml", source, "reward.members=2")
    assert "member-2: reward: done" in output
    saved = yaml.safe_load((place / "runs/x/members/member-2/recipe.yaml").read_text())
    assert saved["data"]["benchmark"] == {}


def test_verify_looks_at_the_members(place: Path) -> None:
    align(place, "run", "r.yaml")
    (place / "runs/x").rename(place / "runs/moved")
    output, _ = align(place, "verify", "runs/moved", "--json")
    found = json.loads(output)
    assert set(found["members"]) == set(MEMBERS)
    assert not [note for note in found["beside"]["notes"] if "members" in note]  # hashed there
    (place / "runs/moved/members/member-3/reward/model/w").write_text("changed")
    output, _ = align(place, "verify", "runs/moved", code=1)
    assert "  members/member-3/reward/model/w: differs from its manifest" in output.splitlines()


def test_verify_looks_at_members_by_number_and_at_those_that_were_left(place: Path) -> None:
    align(place, "run", "r.yaml")
    members = place / "runs/x/members"
    (members / "member-3").rename(members / "member-10")
    output, _ = align(place, "verify", "runs/x", "--json")
    assert list(json.loads(output)["members"]) == ["member-2", "member-10"]
    (members / "member-10/reward/model/w").write_text("changed")
    output, _ = align(place, "verify", "runs/x", code=1)
    assert "  members/member-10/reward/model/w: differs from its manifest" in output.splitlines()


def test_reproduce_compares_the_members(place: Path) -> None:
    align(place, "run", "r.yaml")
    output, _ = align(place, "reproduce", "runs/x")
    for name in MEMBERS:
        assert f"members/{name}/reward/model/w: equal" in output
    (place / "runs/x/members/member-2/reward/model/w").write_text("changed")
    output, _ = align(place, "reproduce", "runs/x", code=1)
    assert "members/member-2/reward/model/w: altered since it was made" in output


def test_a_source_stands_for_all_members(place: Path) -> None:
    recipe = load_recipe(place / "r.yaml", [f"run.root={place}/runs"])
    folders = tuple(f"{place}/runs/x/members/{name}/reward" for name in MEMBERS)
    for stage in ("ppo", "evaluate"):
        (source,) = reward_sources(recipe, stage).values()
        assert source.models == ("reward", *folders)
        assert source.std_penalty == 1.0
    elsewhere = load_recipe(place / "r.yaml", ["run.parents.reward=/data/runs/a/reward"])
    assert member_runs(elsewhere)[0] == Path("/data/runs/a/members/member-2")


def test_how_many_others_there_are_is_nothing_to_the_first(place: Path) -> None:
    three, five = (load_recipe(place / "r.yaml", [f"reward.members={n}"]) for n in (3, 5))
    assert recipe_sha256(three, "reward") == recipe_sha256(five, "reward")
    assert len(member_runs(five)) == 4


def test_the_plan_counts_every_member() -> None:
    words = ["reward.members=3", "ppo.reward=[{ensemble: reward}]"]
    one, three = (
        plan_experiment(open_recipe("miniature/smoke", given, Settings()), on_cpu=True)
        for given in ((), words)
    )
    work = [plan["time"]["stages"] for plan in (one, three)]
    assert work[1]["reward"]["tokens"] == 3 * work[0]["reward"]["tokens"]
    assert work[1]["ppo"]["flops"] > work[0]["ppo"]["flops"]
    for stage in ("ppo", "evaluate"):
        names = [item["name"] for item in three["stages"][stage]["kept"]]
        for role in ("reward", "reward1", "reward2"):
            assert f"adapter: {role}" in names


def test_the_plan_counts_a_held_out_reward_where_it_is_looked_at() -> None:
    words = ["ppo.heldout_reward=/data/judge/reward"]
    stages = plan_experiment(open_recipe("miniature/smoke", words, Settings()))["stages"]
    counted = {
        stage: "adapter: reward1" in [item["name"] for item in stages[stage]["kept"]]
        for stage in ("ppo", "evaluate")
    }
    assert counted == {"ppo": True, "evaluate": False}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["reward.members=1"], "ppo.reward: ensemble: reward needs reward.members of 2 or more"),
        (["reward=null", "run.parents.reward=/a"], "needs reward.members of 2 or more"),
        (
            ["ppo.reward=m:f", "reward.loss=classes", "reward.classes={labels: [a, b]}"],
            "is a matter of ranked responses, and loss=classes has none; allowed: 1",
        ),
    ],
)
def test_no_ensemble_without_members(place: Path, words: list[str], problem: str) -> None:
    _, errors = align(place, "run", "r.yaml", *words, code=2)
    assert problem in errors
