"""Activation by environment: the owner of a process that names no device, and the handling of a wrong guess.

Each test activates devguard in a fresh process with its own environment, before CUDA is initialised, as ``import
torch`` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import fresh

SEVERAL = {"LOCAL_WORLD_SIZE": "4"}


def run(code: str, **environ: str) -> dict[str, Any]:
    """Run `code` after an activation with these variables; ``loads(tag)`` unpickles a tensor with that tag."""
    before = f"""
import os, pickle, warnings
from devguard.activation.activate import activate
from devguard.activation.install import assign
from devguard.cli.selfcheck import tagged_pickle
def loads(tag): return str(pickle.loads(tagged_pickle(tag)).device)
activate({{"DEVGUARD": "repair", **{environ!r}}})
"""
    return fresh.run(before + code)


@pytest.fixture(autouse=True, scope="module")
def _server() -> Iterator[None]:
    """Use one server of forks for all tests here."""
    yield
    fresh.stop()


def out(code: str, **environ: str) -> str:
    return str(run(code, **environ)["out"])


def actions(answer: dict[str, Any], door: str = "load") -> list[str]:
    return [stray["action"] for stray in answer["strays"] if stray["door"] == door]


def test_activation_initialises_no_cuda_and_opens_no_context() -> None:
    code = "print(torch.cuda.is_initialized(), devguard.contexts(), devguard.owner())"
    assert out(code) == "False () None"
    assert out(code, DEVGUARD_DEVICE="cuda:1") == "False () cuda:1"
    assert out(code, LOCAL_RANK="2", **SEVERAL) == "False () cuda:2"


def test_without_an_owner_nothing_is_moved_or_recorded() -> None:
    answer = run("print(loads('cuda:3'), ctx())", **SEVERAL)
    assert answer["out"] == "cuda:3 [3]"
    assert actions(answer) == []


def test_the_device_that_the_main_thread_chose_becomes_the_owner_in_one_of_several_processes() -> None:
    answer = run("torch.cuda.set_device(1); print(loads('cuda:0'), ctx(), devguard.owner())", **SEVERAL)
    assert answer["out"] == "cuda:1 [1] cuda:1"
    assert actions(answer) == ["repaired"]


@pytest.mark.parametrize("mode", ["repair", "error", "warn"])
def test_a_single_process_only_observes(mode: str) -> None:
    answer = run("torch.cuda.set_device(1); print(loads('cuda:0'))", DEVGUARD=mode)
    assert answer["out"] == "cuda:0"
    assert actions(answer) == ["observed"]


def test_error_mode_refuses_in_one_of_several_processes() -> None:
    code = """
torch.cuda.set_device(1)
try: loads('cuda:0')
except devguard.StrayDeviceError as error: print(ctx(), "load" in str(error))
"""
    assert out(code, DEVGUARD="error", **SEVERAL) == "[1] True"


def test_the_device_of_the_local_rank_is_owner_and_current_from_the_first_touch() -> None:
    code = "print(torch.ones(1).to('cuda').device, loads('cuda:0'), ctx())"
    assert out(code, LOCAL_RANK="2", **SEVERAL) == "cuda:2 cuda:2 [2]"


def test_a_tensor_made_at_import_lands_on_the_local_ranks_device() -> None:
    code = """
class Layer: scale = torch.ones(1).to("cuda")
torch.cuda.set_device(2)
print(Layer.scale.device, ctx())
"""
    assert out(code, LOCAL_RANK="2", **SEVERAL) == "cuda:2 [2]"


def test_a_program_can_choose_another_device_than_its_local_rank() -> None:
    code = "torch.cuda.set_device(3); print(loads('cuda:0'), devguard.owner(), ctx())"
    assert out(code, LOCAL_RANK="2", **SEVERAL) == "cuda:3 cuda:3 [3]"


def test_a_local_rank_in_a_job_of_one_process_only_observes() -> None:
    answer = run("torch.cuda.set_device(1); print(loads('cuda:0'))", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    assert answer["out"] == "cuda:0"


def test_entering_a_stream_of_another_device_does_not_choose_it() -> None:
    code = """
torch.cuda.set_device(1)
with torch.cuda.stream(torch.cuda.Stream(2)):
    print(devguard.owner(), loads('cuda:0'))
print(devguard.owner(), torch.cuda.current_device())
"""
    answer = run(code, **SEVERAL)
    assert answer["out"] == "cuda:1 cuda:1\ncuda:1 1"
    code = "torch.cuda.set_stream(torch.cuda.Stream(2)); print(devguard.owner())"
    assert out(code, **SEVERAL) == "cuda:2"


def test_after_a_loop_over_the_devices_the_last_one_is_the_owner() -> None:
    code = """
for index in range(4):
    torch.cuda.set_device(index)
    torch.cuda.synchronize()
torch.cuda.set_device(2)
print(loads('cuda:0'), devguard.owner())
"""
    answer = run(code, **SEVERAL)
    assert answer["out"] == "cuda:2 cuda:2"
    assert actions(answer, "set_device") == []


def test_code_that_saves_and_restores_the_device_does_not_change_the_owner() -> None:
    code = """
torch.cuda.set_device(1)
def elsewhere():
    before = torch.cuda.current_device()
    torch.cuda.set_device(3)
    torch.cuda.set_device(before)
elsewhere()
print(loads('cuda:0'), devguard.owner())
elsewhere()
print(loads('cuda:0'), devguard.owner(), devguard.status()["adoption"]["demoted"])
"""
    answer = run(code, **SEVERAL)
    assert answer["out"].split("\n") == ["cuda:1 cuda:1", "cuda:1 cuda:1 False"]


def test_only_the_main_thread_chooses_the_owner() -> None:
    code = """
import threading
torch.cuda.set_device(1)
thread = threading.Thread(target=torch.cuda.set_device, args=(3,)); thread.start(); thread.join()
print(devguard.owner(), loads('cuda:0'))
"""
    assert out(code, **SEVERAL) == "cuda:1 cuda:1"


def test_a_demotion_under_filters_that_raise_does_not_come_out_of_the_load() -> None:
    code = """
warnings.simplefilter("error")
torch.cuda.set_device(1)
print(loads('cuda:0'))
torch.cuda.set_device(3)
print(loads('cuda:0'), devguard.status()["adoption"]["demoted"])
"""
    assert out(code, **SEVERAL) == "cuda:1\ncuda:0 True"


def test_a_main_thread_that_leaves_its_device_later_demotes_the_owner_with_one_warning() -> None:
    code = """
warnings.simplefilter("always")
torch.cuda.set_device(1)
print(loads('cuda:0'))
with warnings.catch_warnings(record=True) as caught:
    torch.cuda.set_device(3)
    print(loads('cuda:0'), loads('cuda:0'))
(warning,) = [w for w in caught if "devguard assumed" in str(w.message)]
print(warning.lineno == 13, str(warning.message).split(", but")[0], "only observes" in str(warning.message))
print(devguard.status()["adoption"]["demoted"], torch.cuda.current_device())
"""
    answer = run(code, **SEVERAL)
    assert answer["out"].split("\n") == [
        "cuda:1",
        "cuda:0 cuda:0",
        "True devguard assumed that this process owns cuda:1 (from set_device) True",
        "True 3",
    ]
    assert sorted(actions(answer)) == ["observed", "repaired"]


def test_one_model_over_all_gpus_in_one_process_is_left_alone() -> None:
    code = """
torch.cuda.set_device(1)
parts = [torch.nn.Linear(4, 4).to(f"cuda:{index}") for index in range(4)]
saved = pickle.dumps([part.state_dict() for part in parts])
back = [str(part["weight"].device) for part in pickle.loads(saved)]
model = torch.nn.DataParallel(torch.nn.Linear(4, 4).to("cuda:0"))
replicas = [str(replica.weight.device) for replica in model.replicate(model.module, model.device_ids)]
print(back, replicas)
"""
    answer = run(code)
    everywhere = [f"cuda:{index}" for index in range(4)]
    assert answer["out"] == f"{everywhere} {everywhere}"
    assert "repaired" not in [stray["action"] for stray in answer["strays"]]


def test_a_named_device_is_firm_and_current_from_the_first_touch() -> None:
    code = """
print(torch.ones(1).to('cuda').device, ctx())
torch.cuda.set_device(3)
print(loads('cuda:0'), devguard.owner(), devguard.status()["adoption"]["firm"])
"""
    assert out(code, DEVGUARD_DEVICE="cuda:1").split("\n") == ["cuda:1 [1]", "cuda:1 cuda:1 True"]


def test_a_process_that_owns_the_cpu_keeps_what_arrives_on_the_host() -> None:
    assert out("print(loads('cuda:0'), ctx())", DEVGUARD_DEVICE="cpu") == "cpu []"


def test_the_only_visible_device_is_the_owner_whatever_the_rank() -> None:
    code = "print(loads('cuda:1'), devguard.owner())"
    before = 'os.environ["CUDA_VISIBLE_DEVICES"] = "3"\n'
    assert out(before + code, CUDA_VISIBLE_DEVICES="3", LOCAL_RANK="3", **SEVERAL) == "cuda:0 cuda:0"


def test_a_device_that_does_not_exist_is_an_error_that_leaves_torch_as_it_was() -> None:
    code = """
devguard.uninstall()
for environ in ({"DEVGUARD_DEVICE": "cuda:4"}, {"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "8"}):
    try: activate({"DEVGUARD": "repair", **environ})
    except devguard.DeviceResolutionError as error: print("CUDA_VISIBLE_DEVICES" in str(error))
print(any(row["open"] for row in devguard.status()["doors"].values()), torch._C._cuda_init.__module__)
"""
    assert out(code).split("\n")[:2] == ["True", "True"]
    assert out(code).split("\n")[2].startswith("False")


def test_install_and_guards_take_precedence_over_the_environment() -> None:
    code = """
with devguard.guard("cuda:3"):
    print(loads('cuda:0'), devguard.status()["mode"])
devguard.install("repair", "cuda:2")
activate({"DEVGUARD": "error", "DEVGUARD_DEVICE": "cuda:1"})
print(devguard.owner(), devguard.status()["mode"], devguard.status()["said_by"])
print(assign("cuda:0", role="a role"), devguard.owner())
"""
    assert out(code, DEVGUARD="warn", DEVGUARD_DEVICE="cuda:1").split("\n") == [
        "cuda:0 warn",
        "cuda:2 repair install",
        "False cuda:2",
    ]


def test_a_guard_inside_a_process_that_only_observes_repairs() -> None:
    code = """
torch.cuda.set_device(1)
with devguard.guard("cuda:2"): print(loads('cuda:0'))
print(loads('cuda:0'))
"""
    assert out(code).split("\n") == ["cuda:2", "cuda:0"]


def test_a_role_names_the_owner_and_keeps_the_mode_and_doors_of_the_environment() -> None:
    code = """
print(assign(2, role="scheduler TP2"), devguard.owner(), torch.cuda.current_device(), ctx())
status = devguard.status()
print(status["said_by"], status["mode"], status["doors"]["load"]["mode"], status["adoption"])
torch.cuda.set_device(1)
print(loads('cuda:0'), devguard.owner())
"""
    assert out(code, DEVGUARD="error", DEVGUARD_DOORS="load=repair").split("\n") == [
        "True cuda:2 2 [2]",
        "scheduler TP2 error repair None",
        "cuda:2 cuda:2",
    ]


def test_a_touch_before_the_device_was_chosen_is_recorded_with_its_line() -> None:
    answer = run("torch.ones(1).to('cuda')\ntorch.cuda.set_device(1)\ntorch.ones(1).to('cuda')", **SEVERAL)
    (stray,) = [stray for stray in answer["strays"] if stray["door"] == "first_touch"]
    assert (stray["source"], stray["owner"], stray["site"]["line"]) == ("cuda:0", "cuda:1", 8)


def test_a_forked_child_does_not_take_over_the_local_rank_and_has_no_owner_until_it_chooses() -> None:
    code = """
import multiprocessing
def child(answers):
    first = str(devguard.owner())
    torch.cuda.set_device(1)
    answers.put((first, loads('cuda:0'), str(devguard.owner())))
fork = multiprocessing.get_context("fork")
answers = fork.SimpleQueue()
process = fork.Process(target=child, args=(answers,)); process.start(); process.join()
print(*answers.get(), devguard.owner())
"""
    assert out(code, LOCAL_RANK="2", **SEVERAL) == "None cuda:1 cuda:1 cuda:2"


def test_a_local_rank_above_0_without_a_local_size_is_one_of_several_processes() -> None:
    assert out("print(loads('cuda:0'), ctx())", LOCAL_RANK="2", WORLD_SIZE="4") == "cuda:2 [2]"


def test_uninstall_ends_an_activation_by_the_environment() -> None:
    code = "torch.cuda.set_device(1); devguard.uninstall(); print(loads('cuda:0'), devguard.owner())"
    assert out(code, **SEVERAL) == "cuda:0 None"


def test_entering_a_guard_does_not_choose_the_owner() -> None:
    code = """
with devguard.guard("cuda:2"):
    pass
print(devguard.owner(), loads('cuda:0'))
"""
    assert out(code, LOCAL_RANK="1", **SEVERAL) == "cuda:1 cuda:1"


def test_a_thread_on_the_owners_device_is_no_stray_before_anything_else_has_strayed() -> None:
    code = """
import threading
torch.cuda.set_device(1)
thread = threading.Thread(target=lambda: torch.ones(1).to("cuda:1") if torch.cuda.set_device(1) is None else None)
thread.start(); thread.join()
"""
    assert actions(run(code, DEVGUARD="observe", **SEVERAL), "threads") == []


def test_calls_without_effect_before_cuda_is_initialised_do_not_initialise_it() -> None:
    code = """
torch.cuda.empty_cache(); torch.cuda.memory_allocated(); torch.cuda.memory_stats(); torch.cuda.Event()
print(torch.cuda.is_initialized(), ctx())
"""
    assert out(code, DEVGUARD_DEVICE="cuda:1") == "False []"


def test_an_exported_program_lands_on_an_owner_that_was_never_entered() -> None:
    code = """
import io, torch.export
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3).to("cuda:0"))
    def forward(self, x): return x + self.weight
with devguard.unguarded():
    file = io.BytesIO()
    torch.export.save(torch.export.export(Model(), (torch.ones(3).to("cuda:0"),)), file)
    file.seek(0)
loaded = torch.export.load(file)
print(loaded.state_dict["weight"].device, loaded.example_inputs[0][0].device)
"""
    assert out(code, DEVGUARD_DEVICE="cuda:1") == "cuda:1 cuda:1"


RANK_1 = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize("other", [0, 3])
def test_a_launchers_guess_that_was_never_used_is_not_owned_beside_an_explicit_guard(other: int) -> None:
    code = f"""
with devguard.guard({other}):
    torch.ones(1).to("cuda")
    print(devguard.owner(), devguard.status()["owned"], ctx())
print(devguard.status()["owned"])
"""
    answer = run(code, **RANK_1)
    assert answer["out"] == f"cuda:{other} ['cuda:{other}'] [{other}]\n['cuda:{other}']"
    assert answer["strays"] == []


REFUSED = "try: loads('cuda:0')\nexcept devguard.StrayDeviceError: pass"


@pytest.mark.parametrize("before", ["", REFUSED], ids=["no stray before", "a refused stray before"])
def test_a_context_on_the_launchers_guess_beside_an_explicit_guard_is_recorded(before: str) -> None:
    code = f"{before}\nwith devguard.guard(3): torch.ones(1).to('cuda:1')\nprint(devguard.status()['owned'])"
    answer = run(code, DEVGUARD="error", **RANK_1)
    assert answer["out"].split("\n")[-1] == "['cuda:3']"
    (stray,) = [stray for stray in answer["strays"] if stray["door"] == "native"]
    assert (stray["source"], stray["owner"]) == ("cuda:1", "cuda:3")


def test_a_guess_in_use_stays_owned_beside_a_guard_for_another_gpu() -> None:
    code = "x = torch.ones(1).to('cuda')\nwith devguard.guard(3): torch.ones(1).to('cuda')\nprint(x.device, ctx())"
    answer = run(code, **RANK_1)
    assert answer["out"] == "cuda:1 [1, 3]"
    assert answer["strays"] == []


def test_the_guess_is_current_after_a_guard_that_was_the_first_use_of_cuda() -> None:
    code = "with devguard.guard(3): pass\nprint(torch.ones(1).to('cuda').device, ctx())"
    assert out(code, **RANK_1) == "cuda:1 [1, 3]"


def test_after_work_in_an_explicit_guard_a_stray_outside_it_is_only_observed() -> None:
    code = "with devguard.guard(3): kept = torch.ones(1).to('cuda')\nprint(loads('cuda:0'))"
    answer = run(code, **RANK_1)
    assert answer["out"] == "cuda:0"
    assert actions(answer) == ["observed"]


HELPER = """
import multiprocessing
def child(answers):
    USE
    status = devguard.status()
    strays = [(s.door, s.source, s.owner, s.action) for s in devguard.strays()]
    answers.put((found, str(devguard.owner()), ctx(), strays, status["adoption"]["source"], status["adoption"]["firm"]))
fork = multiprocessing.get_context("fork")
answers = fork.SimpleQueue()
process = fork.Process(target=child, args=(answers,)); process.start(); process.join()
print(json.dumps(answers.get()))
"""
INHERITED = "the local rank of its parent"


def helper(use: str, **environ: str) -> Any:
    return json.loads(out(HELPER.replace("USE", use), **environ))


@pytest.mark.parametrize(
    "use",
    [
        "found = loads('cuda:0')",
        "found = str(torch.ones(1).to('cuda').device)",
        "found = str(torch.ones(1).cuda().device)",
    ],
)
def test_a_helper_child_of_a_rank_works_on_the_gpu_of_its_rank(use: str) -> None:
    found, owner, contexts, _, source, firm = helper(use, **RANK_1)
    assert (found, owner, contexts, source, firm) == ("cuda:1", "cuda:1", [1], INHERITED, False)


def test_a_context_of_a_helper_child_on_another_gpu_is_recorded() -> None:
    _, owner, contexts, strays, _, _ = helper("found = str(torch.ones(1).to('cuda:0').device)", **RANK_1)
    assert (owner, contexts) == ("cuda:1", [0])
    assert [(stray[1], stray[2]) for stray in strays] == [("cuda:0", "cuda:1")]


def test_a_helper_child_that_selects_a_device_owns_that() -> None:
    assert helper("torch.cuda.set_device(3); found = loads('cuda:0')", **RANK_1)[:3] == ["cuda:3", "cuda:3", [3]]
    thread = "import threading; t = threading.Thread(target=print); t.start(); t.join(); "
    assert helper(f"{thread}torch.cuda.set_device(3); found = loads('cuda:0')", **RANK_1)[:2] == ["cuda:3", "cuda:3"]


def test_a_helper_child_that_uses_no_gpu_has_no_owner_and_no_context() -> None:
    assert helper("found = torch.ones(1).sum().item()", **RANK_1)[:4] == [1.0, "None", [], []]


def test_a_helper_child_that_sees_fewer_gpus_than_its_rank_is_guarded_without_an_owner() -> None:
    code = """
from devguard.ownership import siblings
from devguard.activation import activate as module
devguard.uninstall()
siblings.is_child = lambda: True
activate({"DEVGUARD": "repair", "LOCAL_RANK": "7", "LOCAL_WORLD_SIZE": "8"})
print(devguard.owner(), devguard.status()["mode"])
"""
    assert out(code) == "None repair"


@pytest.mark.parametrize("rank", ["0", "1", "3"])
def test_a_device_that_is_named_for_each_rank_is_firm(rank: str) -> None:
    environ = {"DEVGUARD_DEVICE": f"cuda:{rank}", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "4"}
    code = "print(loads('cuda:2'), devguard.owner(), devguard.status()['adoption']['firm'])"
    assert out(code, **environ) == f"cuda:{rank} cuda:{rank} True"


def test_a_helper_child_of_a_rank_with_a_named_device_inherits_that_as_a_guess() -> None:
    environ = {"DEVGUARD_DEVICE": "cuda:1", **RANK_1}
    assert helper("found = loads('cuda:0')", **environ)[:3] == ["cuda:1", "cuda:1", [1]]


OPENS = {
    "a factory that pins": "torch.zeros(4, pin_memory=True)",
    "a stream": "torch.Stream('cuda')",
    "the driver": "open_by_driver()",
}
NATIVE = "[(s.door, s.source, s.owner) for s in devguard.strays()]"


class TestAProcessThatOwnsTheCpuFromTheStart:
    """A context that no other door sees is a stray, although the owner was never entered before."""

    @pytest.mark.parametrize("mode", ["observe", "warn", "repair", "error"])
    @pytest.mark.parametrize("opens", OPENS.values(), ids=list(OPENS))
    def test_the_first_context_is_found(self, opens, mode):
        code = (
            "def open_by_driver():\n    import ctypes; c, d = ctypes.c_void_p(), ctypes.CDLL('libcuda.so.1')\n"
            "    d.cuInit(0); d.cuDevicePrimaryCtxRetain(ctypes.byref(c), 0)\n"
            f"warnings.simplefilter('ignore'); x = {opens}\nprint({NATIVE}, ctx())"
        )
        assert out(code, DEVGUARD=mode, DEVGUARD_DEVICE="cpu") == "[('native', 'cuda:0', 'cpu')] [0]"

    def test_the_end_of_the_process_finds_it(self):
        code = (
            "x = torch.zeros(4, pin_memory=True)\nfrom devguard.reporting.journal import journal\n"
            "from devguard.support import process_exit\n"
            "from devguard.activation.activate import _look_at_end; _look_at_end()\n"
            "print([s.source for s in journal.strays()])"
        )
        assert out(code, DEVGUARD_DEVICE="cpu") == "['cuda:0']"

    def test_no_strays_finds_it(self):
        code = (
            "try:\n    with devguard.no_strays(): x = torch.Stream('cuda')\n"
            "except devguard.StrayDeviceError as error: print('native: cuda:0' in str(error))"
        )
        assert out(code, DEVGUARD_DEVICE="cpu") == "True"

    def test_a_forked_child_finds_it(self):
        code = (
            "import os\npid = os.fork()\n"
            "if pid == 0:\n    x = torch.zeros(4, pin_memory=True)\n"
            f"    os._exit({NATIVE} != [('native', 'cuda:0', 'cpu')])\n"
            "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
        )
        assert out(code, DEVGUARD_DEVICE="cpu") == "0"

    @pytest.mark.parametrize(
        "work",
        [
            "",
            "with devguard.guard(1): torch.empty(4, device='cuda')",
            "with devguard.unguarded(): x = torch.zeros(4, pin_memory=True)",
            "devguard.allow('cuda:0'); x = torch.zeros(4, pin_memory=True)",
        ],
    )
    def test_other_work_is_no_stray(self, work):
        code = f"{work}\nprint([row for row in {NATIVE} if row[0] == 'native'])"
        assert out(code, DEVGUARD_DEVICE="cpu") == "[]"


def test_a_named_owner_is_owned_before_its_first_entry() -> None:
    code = (
        "@devguard.guard(2)\ndef work(): return torch.empty(4, device='cuda')\n"
        "x = torch.empty(4, device='cuda'); y = work()\nprint(ctx(), devguard.strays())"
    )
    assert out(code, DEVGUARD_DEVICE="cuda:1") == "[1, 2] ()"


def test_a_named_owner_is_recorded_with_a_context_that_a_call_of_another_guard_opens() -> None:
    code = (
        "@devguard.guard(2)\ndef work(): return torch.empty(4, device='cuda:3')\n"
        "x = torch.empty(4, device='cuda'); y = work()\n"
        "from devguard.reporting.journal import journal\nprint([(s.source, s.owner) for s in journal.strays()])"
    )
    assert out(code, DEVGUARD_DEVICE="cuda:1") == "[('cuda:3', 'cuda:1, cuda:2')]"
