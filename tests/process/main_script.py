"""Start child processes with decorated functions that are defined in ``__main__``; prints one JSON object.

Arguments: the start method, and a file with a pickle that carries the tag of a GPU.
"""

import json
import multiprocessing
import pickle
import subprocess
import sys

import cloudpickle

import devguard


def report(payload):
    try:
        loaded = pickle.loads(payload).tolist()
    except Exception as error:  # noqa: BLE001 - the result for the parent
        loaded = str(error)
    return {"owner": str(devguard.owner()), "loaded": loaded}


@devguard.guard("cpu")
def decorated(queue, payload):
    queue.put(report(payload))


@devguard.guard(argument="device")
def by_argument(queue, payload, *, device="cpu"):
    queue.put(report(payload))


class Worker:
    @devguard.guard("cpu")
    def method(self, queue, payload):
        queue.put(report(payload))

    @classmethod
    @devguard.guard("cpu")
    def of_class(cls, queue, payload):
        queue.put(report(payload))


def undecorated(queue, payload):
    queue.put(report(payload))


@devguard.guard("cpu")
def plain(payload):
    return report(payload)


@devguard.guard("cpu")
async def coroutine(payload):
    return report(payload)


@devguard.guard("cpu")
def generator(payload):
    yield report(payload)


@devguard.guard("cpu")
async def async_generator(payload):
    yield report(payload)


def by_value(payload):
    """Send functions by value to a process that has imported neither this module nor anything else."""
    here = "closure"

    @devguard.guard("cpu")
    def closure(payload):
        return report(payload) | {"here": here}

    functions = {
        "function": plain,
        "closure": closure,
        "lambda": devguard.guard("cpu")(lambda payload: report(payload)),
        "bound": devguard.guard("cpu").bind(lambda payload: report(payload)),
        "method": Worker().method,
        "coroutine": coroutine,
        "generator": generator,
        "async generator": async_generator,
        "undecorated": report,
    }
    child = """
import asyncio, inspect, json, pickle, sys
functions, payload = pickle.load(sys.stdin.buffer)
results = {}
async def first(steps):
    return [item async for item in steps][0]
class Queue(list):
    put = list.append
for name, function in functions.items():
    if name == "method":
        queue = Queue()
        function(queue, payload)
        result = queue[0]
    elif inspect.iscoroutinefunction(function):
        result = asyncio.run(function(payload))
    elif inspect.isasyncgenfunction(function):
        result = asyncio.run(first(function(payload)))
    elif inspect.isgeneratorfunction(function):
        result = list(function(payload))[0]
    else:
        result = function(payload)
    results[name] = result
print(json.dumps(results))
"""
    done = subprocess.run(
        [sys.executable, "-c", child], input=cloudpickle.dumps((functions, payload)), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def main():
    method, path = sys.argv[1:]
    with open(path, "rb") as file:
        payload = file.read()
    if method == "cloudpickle":
        print(json.dumps(by_value(payload)))
        return
    context = multiprocessing.get_context(method)
    targets = {
        "decorated": decorated,
        "by argument": by_argument,
        "method": Worker().method,
        "class method": Worker.of_class,
        "bound": devguard.guard("cpu").bind(undecorated),
    }
    results = {}
    queue = context.SimpleQueue()
    for name, target in targets.items():
        process = context.Process(target=target, args=(queue, payload))
        process.start()
        results[name] = queue.get()
        process.join()
        assert process.exitcode == 0
    print(json.dumps(results))


if __name__ == "__main__":
    main()
