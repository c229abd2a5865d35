"""Training many runs side by side: on processes of this machine, or on the workers of a Dask cluster.

Both ways call a function for entries of the cache, and tell how each call ended; one that fails ends no other.
"""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import NamedTuple

import torch
from joblib import Parallel, delayed, parallel_config

from deepknn_lib.storage import claim, whole_file
from deepknn_lib.study.cache import FILES, Entry, content_digest

# Errors that are told as they are; others become a RuntimeError.
KINDS = (FileNotFoundError, OSError, FloatingPointError, ValueError, RuntimeError)
_ONE_AT_A_TIME = threading.Lock()  # of the runs that a worker of a cluster executes


class Ended(NamedTuple):
    """How the training of an entry ended: what it returned, or its error; and the texts of its warnings."""

    entry: Entry
    value: object
    error: Exception | None = None
    warnings: tuple[str, ...] = ()


def attempt(work: Callable, entry: Entry) -> Ended:
    """Call `work` for an entry, and keep its error and its warnings, which would end in the cell of a notebook."""
    value = failure = None
    with warnings.catch_warnings(record=True) as said:
        try:
            value = work(entry)
        except KINDS as error:
            failure = error
        except Exception as error:
            failure = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    texts = [str(one.message) for one in said if issubclass(one.category, UserWarning)]
    return Ended(entry, value, failure, tuple(dict.fromkeys(texts)))


def on_processes(jobs: int, work: Callable, entries: list[Entry]) -> Iterator[Ended]:
    """Call `work` in so many processes of this machine, a core each; for one job at a time it is this process."""
    told = {name: value for name, value in os.environ.items() if name.startswith("DEEPKNN_")}
    with parallel_config("loky", n_jobs=jobs, initializer=_begin_process, initargs=(os.getpid(), told)):
        parallel = Parallel(return_as="generator_unordered", batch_size=1)
    # A process that grew is replaced by a new one, of which nobody needs to know.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
    left = dict.fromkeys(entries)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # Processes inherit it; they end with this one.
    try:
        results = parallel(delayed(attempt)(work, entry) for entry in entries)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    try:
        with contextlib.closing(results):
            for ended in results:
                del left[ended.entry]
                yield ended
    except BrokenProcessPool:
        told = "a process was killed, perhaps for want of memory; do fewer runs at once (--jobs)"
        yield from (Ended(entry, None, RuntimeError(told)) for entry in left)


def _begin_process(parent: int, environment: dict[str, str]) -> None:
    """Make a process ready to execute runs, on one core, and to end when its parent is gone, which asked for them."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(1)
    # Several processes would write over one another's line.
    os.environ.update({"DEEPKNN_PROGRESS": os.devnull} | environment)


def on_cluster(address: str, work: Callable, entries: list[Entry]) -> Iterator[Ended]:
    """Call `work` on the workers of a Dask cluster, and put what they made into the cache of this machine.

    ValueError where Dask is not installed, OSError if no scheduler with a worker answers at the address.
    """
    try:
        import dask
        import distributed
    except ImportError as error:
        raise ValueError("a cluster and its workers need Dask: pip install -e '.[cluster]'") from error
    try:
        client = distributed.Client(address, timeout="10s", set_as_default=False)
        client.wait_for_workers(1, timeout=60)
    except (OSError, ValueError, distributed.TimeoutError) as error:
        told = f"no Dask scheduler with workers answers at {address} ({error})"
        raise OSError(f"{told}; start one with `dask scheduler`, and workers") from error
    waiting, entry_of = iter(entries), {}
    running = distributed.as_completed([], loop=client.loop, with_results=True, raise_errors=False)

    def submit():
        """Keep the workers busy; not with all at once, as the files of a base go with each entry."""
        if "workers" not in (known := client.scheduler_info(n_workers=-1)):
            raise OSError(f"the scheduler at {address} is gone; start it and its workers again")
        workers = known["workers"].values()
        needs = {"GPU": 1} if any("GPU" in worker["resources"] for worker in workers) else None
        for entry in islice(waiting, max(2 * len(workers) - running.count(), 1)):
            task = work, entry, entry.base and _files(entry.base)
            future = client.submit(_on_worker, *task, pure=False, resources=needs)
            entry_of[future.key] = entry
            running.add(future)

    # Dask warns of large arguments, such as the files of a base.
    with client, dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
        submit()
        for future, ended in running:
            if future.status != "finished":
                told = f"Dask gave it up: {future.exception() or future.status}"
                ended = Ended(entry_of[future.key], None, RuntimeError(told))
            elif ended.value:
                _put(ended.entry, ended.value)
            yield ended
            submit()


def _on_worker(work: Callable, entry: Entry, of_base: dict[str, bytes] | None) -> Ended:
    """Work on an entry in the data folder of this worker; the value is its files, or None if another is at it."""
    from distributed import get_worker

    def make(entry: Entry) -> dict[str, bytes] | None:
        content_digest.cache_clear()
        if entry.base:
            _put(entry.base, of_base)
        return _files(entry) if work(entry) else None

    os.environ.setdefault("DEEPKNN_PROGRESS", os.devnull)
    torch.set_num_threads(get_worker().state.nthreads)
    with _ONE_AT_A_TIME:  # Warnings are caught for all threads of a process.
        return attempt(make, entry)


def _files(entry: Entry) -> dict[str, bytes]:
    return {name: (entry.folder / name).read_bytes() for name in ("run.json", *FILES)}


def _put(entry: Entry, files: dict[str, bytes]) -> None:
    """Put the files of a run in place, unless they are there."""
    with claim(entry.folder):
        if not entry.result():
            with whole_file(entry.folder) as fresh:
                fresh.mkdir()
                for name, content in files.items():
                    (fresh / name).write_bytes(content)
