"""The whole demonstration, in real processes on simulated GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from devguard.demo import launch, pictures
from tests.helpers import simulated

VERSION = os.environ.get("DEVGUARD_TEST_TORCH")


def run_demo(*arguments, env=None):
    """Run ``devguard demo`` and return the finished process."""
    command = [sys.executable, "-m", "devguard", "demo", *arguments]
    return subprocess.run(
        command, cwd=simulated.ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )


def run_on_simulated_gpus(*arguments):
    version = ["--torch", VERSION] if VERSION else []
    done = run_demo("--backend", "simulated", "--json", *version, *arguments)
    assert done.returncode == 0, done.stderr
    return done, json.loads(done.stdout)


def check(result, ranks):
    """Check the strays of the unguarded pass, and that the guarded pass has none."""
    assert result["ranks"] == ranks
    before, after = result["unguarded"], result["guarded"]
    for run in (before, after):
        assert run["values_equal"] is True
        assert sorted((answer["transport"], answer["rank"]) for answer in run["answers"]) == [
            (way, rank) for way in ("data-parallel", "tensor-parallel") for rank in range(ranks)
        ]
        assert [process["name"] for process in run["processes"]] == ["tokenizer", *(f"rank {r}" for r in range(ranks))]
        assert len({process["pid"] for process in run["processes"]}) == ranks + 1
    held = [{device["index"]: device for device in process["devices"]} for process in before["processes"]]
    for rank in range(1, ranks):
        assert held[1 + rank][0]["context"]
        assert held[1 + rank][0]["peak_bytes"] >= 2 * result["request_bytes"] > 0
    assert before["stray_contexts"] == ranks - 1
    assert before["stray_bytes"] == sum(held[1 + rank][0]["peak_bytes"] for rank in range(1, ranks))
    assert {answer["device"] for answer in before["answers"]} == {"cuda:0"}

    assert after["stray_bytes"] == after["stray_contexts"] == 0
    for process in after["processes"][1:]:
        assert process["owner"] == f"cuda:{process['rank']}"
        assert [device["index"] for device in process["devices"]] == [process["rank"]]
        assert process["devices"][0]["peak_bytes"] >= 2 * result["request_bytes"]
        assert {stray["action"] for stray in process["strays"]} == ({"repaired"} if process["rank"] else set())
    assert all(answer["device"] == f"cuda:{answer['rank']}" for answer in after["answers"])


@pytest.fixture(scope="module")
def two_ranks(sim_environment, tmp_path_factory):
    chart = tmp_path_factory.mktemp("chart") / "chart.png"
    done, result = run_on_simulated_gpus("--ranks", "2", "--plot", str(chart))
    return done, result, chart


def test_two_ranks_stray_only_without_the_guard(two_ranks):
    _, result, _ = two_ranks
    assert result["backend"] == "simulated"
    assert "+cu" in result["torch"]
    assert result["images"] == [{"file": "picture.jpg", "grid_thw": [1, 54, 74]}]
    assert result["request_bytes"] == 54 * 74 * 1176 * 4 + 3 * 8
    check(result, 2)


def test_the_strays_are_at_the_two_lines_that_unpickle(two_ranks):
    _, result, _ = two_ranks
    (rank_1,) = (process for process in result["guarded"]["processes"] if process["rank"] == 1)
    found = {stray["site"]["function"]: stray for stray in rank_1["strays"]}
    assert set(found) == {"broadcast_request", "receive_request"}
    for stray in found.values():
        assert stray["code"].endswith("= pickle.loads(message)")
        assert (stray["door"], stray["source"], stray["target"]) == ("load", "cuda:0", "cuda:1")
        assert stray["count"] == 2
        assert stray["bytes"] == result["request_bytes"]


def test_progress_goes_to_standard_error_and_only_json_to_standard_output(two_ranks):
    done, _, chart = two_ranks
    assert done.stdout.startswith("{")
    assert "devguard demo: 2 ranks on simulated GPUs (selected with --backend simulated)" in done.stderr
    assert "devguard demo: guarded: data-parallel: one message to each rank" in done.stderr
    with Image.open(chart) as picture:
        assert picture.format == "PNG"


def test_four_ranks_with_pictures_of_the_user_stray_only_without_the_guard(sim_environment, tmp_path):
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "wide.png")
    Image.new("L", (100, 240), 7).save(tmp_path / "tall.png")
    files = [str(tmp_path / "wide.png"), str(tmp_path / "tall.png")]
    _, result = run_on_simulated_gpus("--ranks", "4", "--image", *files)
    assert [image["grid_thw"] for image in result["images"]] == [[1, 14, 22], [1, 18, 8]]
    check(result, 4)


def test_with_the_host_transport_each_request_goes_down_once_and_up_once_a_rank(sim_environment):
    _, result = run_on_simulated_gpus("--ranks", "3", "--transport", "host")
    before, after = result["unguarded"], result["guarded"]
    assert (before["stray_contexts"], after["stray_contexts"], after["stray_bytes"]) == (2, 0, 0)
    assert after["values_equal"] is True
    assert [process["strays"] for process in after["processes"]] == [[]] * 4  # nothing had to be repaired
    assert [answer["device"] for answer in after["answers"]] == ["cuda:0", "cuda:1", "cuda:2"] * 2
    size, costs = result["request_bytes"], after["costs"]
    assert costs["copies"]["tensor-parallel"] == {"down": size, "up": 3 * size, "across": 0}
    assert costs["copies"]["data-parallel"] == {"down": 3 * size, "up": 3 * size, "across": 0}
    assert costs["contexts"] == 4  # the tokenizer and each rank on its own GPU
    assert costs["gpu_0_peak"] < before["costs"]["gpu_0_peak"]
    assert before["costs"]["copies"]["tensor-parallel"]["down"] == 2 * size
    assert size < costs["host_peak"] < 4 * size < before["costs"]["host_peak"]


def test_with_backend_real_each_process_reports_on_itself(sim_environment, tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "wide.png")
    environment = sim_environment(2)
    done = run_demo("--backend", "real", "--json", "--image", str(tmp_path / "wide.png"), env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["backend"] == "real"
    check(result, 2)


def test_a_pass_outside_the_simulation_is_an_error(sim_environment, tmp_path):
    environment = launch.clean(sim_environment(2))
    other = sim_environment(2)["DEVGUARD_SIM_STATE"]  # a state file that no process of the pass writes
    task = {"guarded": False, "ranks": 2, "images": [str(pictures.DEFAULT)], "folder": str(tmp_path), "state": other}
    with pytest.raises(launch.DemoError, match="is not in the simulation's state file"):
        launch.run_pass(task, environment, lambda text: None)
